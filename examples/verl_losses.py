"""DAPO with verl, loss and head by prism_fast. verl imports this module in every worker that trains:

python -m verl.trainer.main_ppo data.train_files=... actor_rollout_ref.model.path=... \
    actor_rollout_ref.model.external_lib=examples.verl_losses \
    actor_rollout_ref.model.use_fused_kernels=True actor_rollout_ref.model.fused_kernel_options.impl_backend=torch \
    actor_rollout_ref.actor.policy_loss.loss_mode=prism_vanilla \
    actor_rollout_ref.actor.loss_agg_mode=token-mean actor_rollout_ref.actor.clip_ratio_high=0.28
"""

from prism_fast.integrations import verl

verl.register()
verl.use_linear_logprob()
