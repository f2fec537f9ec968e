"""A file for each family of models; `../known.py` lists them."""
