"""The two architectures as data, and the one transformer that both describe."""
