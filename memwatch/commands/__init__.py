"""One module a command of ``memwatch``: its arguments, and what it does with them."""
