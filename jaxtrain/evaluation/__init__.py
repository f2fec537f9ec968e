"""Tasks that a model's log-probabilities and answers are held against."""
