"""Nonsense from everywhere: each input is refused in one line, or read; examples are those that once did harm."""
