"""What `conformance.check_estimator` is made of: costs, adapters, a file for each kind of check, the report."""
