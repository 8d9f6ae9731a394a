"""Ranking metrics, significance, similarity distributions. To add a metric: a row in ranking.METRICS."""
