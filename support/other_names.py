"""
What TRL (T), Hugging Face's Trainer (H), DeepSpeed-Chat (D) and OpenRLHF (O) call our flags, and
what stands in place of theirs: for the error that an unknown flag gets. support/README.md has the
common ones side by side.
"""

OTHER_NAMES = {
    "--lr": "--learning_rate; in step 3 --actor_learning_rate and --critic_learning_rate",
    "--model": "--model_name_or_path; in step 3 --actor_model_name_or_path",
    "--batch_size": "--per_device_train_batch_size",
    "--epochs": "--num_train_epochs",
    "--beta": "--kl_coef, or --dpo_beta for DPO",                            # T
    "--init_kl_coef": "--kl_coef",                                           # T, O
    "--max_new_tokens": "--max_answer_seq_len",                              # T, H
    "--response_length": "--max_answer_seq_len",                             # T
    "--max_response_length": "--max_answer_seq_len",
    "--max_completion_length": "--max_answer_seq_len",                       # T
    "--generate_max_len": "--max_answer_seq_len",                            # O
    "--max_prompt_length": "--max_prompt_seq_len",                           # T
    "--prompt_max_len": "--max_prompt_seq_len",                              # O
    "--max_length": "--max_seq_len",                                         # T
    "--max_len": "--max_seq_len",                                            # O
    "--lora_rank": "--lora_dim",                                             # O
    "--lora_r": "--lora_dim",                                                # T
    "--use_peft": "--lora_dim 16 --only_optimize_lora",                      # T
    "--lora_target_modules": "--lora_module_name",                           # T
    "--resume_from_checkpoint": "--resume",                                  # H
    "--load_checkpoint": "--resume",                                         # O
    "--reward_model_path": "--critic_model_name_or_path",                    # T
    "--reward_pretrain": "--critic_model_name_or_path",                      # O
    "--critic_pretrain": "--critic_model_name_or_path",                      # O
    "--sft_model_path": "--actor_model_name_or_path",                        # T
    "--pretrain": "--model_name_or_path, or --actor_model_name_or_path",     # O
    "--reward_funcs": "--reward_fn file.py:function",                        # T
    "--remote_rm_url": "--reward_fn file.py:function",                       # O
    "--dataset_name": "--data_path",                                         # T
    "--dataset": "--data_path",                                              # O
    "--input_key": "--columns prompt=...",                                   # O
    "--prompt_key": "--columns prompt=...",                                  # O
    "--output_key": "--columns response=...",                                # O
    "--chosen_key": "--columns chosen=...",                                  # O
    "--rejected_key": "--columns rejected=...",                              # O
    "--dataset_text_field": "--columns prompt=... response=...",             # T
    "--prompt_data": "--data_path",                                          # O
    "--advantage_estimator": "--advantage",                                  # O
    "--num_ppo_epochs": "--ppo_epochs",                                      # T
    "--total_episodes": "--max_steps, of --per_device_generation_batch_size prompts each",  # T
    "--num_mini_batches": "--gradient_accumulation_steps",                   # T
    "--train_batch_size": "--per_device_train_batch_size",
    "--micro_train_batch_size": "--per_device_train_batch_size",             # O
    "--per_device_training_batch_size": "--per_device_train_batch_size",     # D
    "--per_device_eval_batch_size": "--per_device_train_batch_size, for evaluation too",  # H
    "--rollout_batch_size": "--per_device_generation_batch_size",            # O
    "--local_rollout_forward_batch_size": "--per_device_generation_batch_size",  # T
    "--n_samples_per_prompt": "--num_generations",                           # O
    "--vf_coef": "--critic_learning_rate, because the critic has a step of its own",  # T
    "--eps_clip": "--cliprange",                                             # O
    "--epsilon": "--cliprange",                                              # T
    "--value_clip": "--cliprange_value",                                     # O
    "--warmup_steps": "--num_warmup_steps",                                  # H
    "--lr_warmup_ratio": "--num_warmup_steps",                               # O
    "--warmup_ratio": "--num_warmup_steps",                                  # H
    "--lambd": "--lam",                                                      # O
    "--max_epochs": "--num_train_epochs",                                    # O
    "--save_path": "--output_dir",                                           # O
    "--ptx_coef": "--unsup_coef",                                            # O
    "--deepspeed": "--deepspeed_config",                                     # H, D
    "--sft_only_data_path": "--sft_data_path",                               # D
    "--unsupervised_dataset_name": "--unsupervised_data_path",               # D
    "--actor_lora_dim": "--lora_dim",                                        # D
    "--actor_zero_stage": "--zero_stage, for actor and critic alike",        # D
    "--critic_zero_stage": "--zero_stage, for actor and critic alike",       # D
    "--actor_gradient_checkpointing": "--gradient_checkpointing",            # D
    "--critic_gradient_checkpointing": "--gradient_checkpointing",           # D
    "--offload": "--deepspeed_config with offload_optimizer in its JSON",    # D
    "--adam_offload": "--deepspeed_config with offload_optimizer in its JSON",  # O
    "--offload_reference_model": "--deepspeed_config with offload_param in its JSON",  # D
    "--dtype": "--deepspeed_config with bf16 in its JSON (configs/1gpu.json has it)",  # D
    "--torch_dtype": "--deepspeed_config with bf16 in its JSON (configs/1gpu.json has it)",  # T
    "--bf16": "--deepspeed_config with bf16 in its JSON (configs/1gpu.json has it)",  # H
    "--fp16": "--deepspeed_config with fp16 in its JSON",                    # H
    "--report_to": "--deepspeed_config with tensorboard or wandb in its JSON",  # H
    "--use_wandb": "--deepspeed_config with wandb in its JSON",              # O
    "--max_grad_norm": "--deepspeed_config with gradient_clipping in its JSON",  # H
    "--enable_tensorboard": "--deepspeed_config with tensorboard in its JSON",  # D
    "--attn_implementation": "nothing: PyTorch's scaled dot product attention is used",  # T
    "--flash_attn": "nothing: PyTorch's scaled dot product attention is used",  # O
    "--apply_chat_template": "nothing: the chat template is always applied",  # O
    "--packing": "nothing: rows are padded to the longest of their batch",   # T
    "--packing_samples": "nothing: rows are padded to the longest of their batch",  # O
    "--completion_only_loss": "nothing: answers alone are trained on by default",  # T
    "--whiten_rewards": "nothing: advantages are whitened, rewards are not",  # T
    "--top_k": "nothing: --temperature and --top_p say how answers are sampled",
    "--use_vllm": "nothing: the trained weights generate by themselves",     # T
    "--vllm_num_engines": "nothing: the trained weights generate by themselves",  # O
    "--eval_strategy": "--eval_steps",                                       # H
    "--evaluation_strategy": "--eval_steps",                                 # H
    "--enable_hybrid_engine": "nothing: it is always on",                    # D
    "--print_answers": "nothing: answers are printed, and kept in samples.jsonl",  # D
    # OpenRLHF's dotted names
    "--actor.model_name_or_path": "--model_name_or_path, or --actor_model_name_or_path",
    "--reward.model_name_or_path": "--critic_model_name_or_path",
    "--critic.model_name_or_path": "--critic_model_name_or_path",
    "--reward.remote_url": "--reward_fn file.py:function",
    "--data.prompt_dataset": "--data_path",
    "--data.dataset": "--data_path",
    "--data.input_key": "--columns prompt=...",
    "--data.max_len": "--max_seq_len",
    "--data.apply_chat_template": "nothing: the chat template is always applied",
    "--rollout.max_new_tokens": "--max_answer_seq_len",
    "--rollout.batch_size": "--per_device_generation_batch_size",
    "--rollout.n_samples_per_prompt": "--num_generations",
    "--rollout.temperature": "--temperature",
    "--rollout.top_p": "--top_p",
    "--train.micro_batch_size": "--per_device_train_batch_size",
    "--train.batch_size": "--per_device_train_batch_size",
    "--train.max_epochs": "--num_train_epochs",
    "--train.enable_ema": "--enable_ema",
    "--train.seed": "--seed",
    "--algo.kl.init_coef": "--kl_coef",
    "--algo.kl.target": "--kl_target",
    "--algo.advantage.estimator": "--advantage",
    "--algo.advantage.lambd": "--lam",
    "--algo.advantage.gamma": "--gamma",
    "--actor.eps_clip": "--cliprange",
    "--critic.value_clip": "--cliprange_value",
    "--actor.adam.lr": "--actor_learning_rate; in steps 1 and 2 --learning_rate",
    "--critic.adam.lr": "--critic_learning_rate",
    "--actor.lr_warmup_ratio": "--num_warmup_steps",
    "--actor.gradient_checkpointing_enable": "--gradient_checkpointing",
    "--ds.lora.rank": "--lora_dim",
    "--ds.lora.alpha": "--lora_alpha",
    "--ds.zero_stage": "--zero_stage",
    "--ds.adam_offload": "--deepspeed_config with offload_optimizer in its JSON",
    "--ds.param_dtype": "--deepspeed_config with bf16 in its JSON (configs/1gpu.json has it)",
    "--ds.packing_samples": "nothing: rows are padded to the longest of their batch",
    "--ds.attn_implementation": "nothing: PyTorch's scaled dot product attention is used",
    "--ckpt.output_dir": "--output_dir",
    "--ckpt.save_steps": "--save_steps",
    "--ckpt.load_enable": "--resume",
    "--logger.wandb.key": "--deepspeed_config with wandb in its JSON",
    "--logger.logging_steps": "--logging_steps",
    "--vllm.num_engines": "nothing: the trained weights generate by themselves",
}
