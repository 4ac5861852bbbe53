"""Programs of the maintainers: the estimator tables, the drawings of the guides, what CuPy offers."""
