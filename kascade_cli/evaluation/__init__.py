"""Exact match of attention strategies on long-context questions."""
