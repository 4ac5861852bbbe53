"""Compact models with discrete latent variables. A model is handed its estimator; it imports none."""
