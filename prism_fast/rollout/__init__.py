"""Rollout engines: sample responses from the policy and return exact token ids with their log-probs."""
