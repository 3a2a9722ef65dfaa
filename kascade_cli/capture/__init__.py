"""Model -> HDF5: the probe (what is measured), the store (how it is kept) and the loop between them."""
