"""Studies: one file a paper, its claim put to the test; `polyreward reproduce` runs them."""
