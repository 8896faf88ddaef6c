"""One alignment step: the published schedule beside ours, over the same weights and rollouts, compared and timed."""
