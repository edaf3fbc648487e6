"""Asking a model questions and scoring its answers: tasks, sampling, extraction, grading, metrics, rewards."""
