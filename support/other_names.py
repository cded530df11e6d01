"""
What TRL (T), Hugging Face's Trainer (H), DeepSpeed-Chat (D) and OpenRLHF (O) call our flags, and
what stands in place of theirs: for the error that an unknown flag gets.
"""

OTHER_NAMES = {
    "--lr": "--learning_rate; in step 3 --actor_learning_rate and --critic_learning_rate",
    "--batch_size": "--per_device_train_batch_size",
    "--epochs": "--num_train_epochs",
    "--beta": "--kl_coef, or --dpo_beta for DPO",                            # T
    "--init_kl_coef": "--kl_coef",                                           # T, O
    "--max_new_tokens": "--max_answer_seq_len",                              # T, H
    "--response_length": "--max_answer_seq_len",                             # T
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
    "--prompt_data": "--data_path",                                          # O
    "--advantage_estimator": "--advantage",                                  # O
    "--num_ppo_epochs": "--ppo_epochs",                                      # T
    "--num_mini_batches": "--gradient_accumulation_steps",                   # T
    "--train_batch_size": "--per_device_train_batch_size",
    "--micro_train_batch_size": "--per_device_train_batch_size",             # O
    "--per_device_training_batch_size": "--per_device_train_batch_size",     # D
    "--rollout_batch_size": "--per_device_generation_batch_size",            # O
    "--n_samples_per_prompt": "--num_generations",                           # O
    "--vf_coef": "--critic_learning_rate, because the critic has a step of its own",  # T
    "--eps_clip": "--cliprange",                                             # O
    "--warmup_steps": "--num_warmup_steps",                                  # H
    "--lr_warmup_ratio": "--num_warmup_steps",                               # O
    "--warmup_ratio": "--num_warmup_steps",                                  # H
    "--lambd": "--lam",                                                      # O
    "--max_epochs": "--num_train_epochs",                                    # O
    "--save_path": "--output_dir",                                           # O
    "--ptx_coef": "--unsup_coef",                                            # O
    "--deepspeed": "--deepspeed_config",                                     # H, D
    "--sft_only_data_path": "--sft_data_path",                               # D
    "--actor_lora_dim": "--lora_dim",                                        # D
    "--offload": "--deepspeed_config with offload_optimizer in its JSON",    # D
    "--bf16": "--deepspeed_config with bf16 in its JSON (configs/1gpu.json has it)",  # H
    "--fp16": "--deepspeed_config with fp16 in its JSON",                    # H
    "--report_to": "--deepspeed_config with tensorboard or wandb in its JSON",  # H
    "--use_wandb": "--deepspeed_config with wandb in its JSON",              # O
    "--max_grad_norm": "--deepspeed_config with gradient_clipping in its JSON",  # H
    "--attn_implementation": "nothing: PyTorch's scaled dot product attention is used",  # T
    "--eval_strategy": "--eval_steps",                                       # H
    "--enable_hybrid_engine": "nothing: it is always on",                    # D
    "--print_answers": "nothing: three answers are printed at the end",      # D
}
