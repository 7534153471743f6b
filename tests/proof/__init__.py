"""The proof of the promises as a whole: what examples do not find, and how much of it was tried."""
