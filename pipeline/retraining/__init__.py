"""Scheduled retraining: attempts, what they start from, what stops them, whom they tell."""
