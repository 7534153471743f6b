"""Bugs that are planted in a copy of the package, to see that the tests find them."""
