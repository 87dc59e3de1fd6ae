"""Evaluation: tasks over a user's own held-out rows, statistics, and the page that shows them."""
