"""Layer 3: how nodes find each other and agree on who is who."""
