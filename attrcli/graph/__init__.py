"""A model as data: an fx graph of ATen operations in canonical form, and what is done to such graphs."""
