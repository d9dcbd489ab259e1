"""``elastic-job ui``: a page that shows the jobs of this user on this host, live, in a browser."""
