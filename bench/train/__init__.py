"""The policy's update: TRL's GRPO trainer beside ours, over the same weights and rollouts, compared and timed."""
