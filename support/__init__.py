"""
What a run needs that is not RLHF. Skip it on a first reading, and come back for one room at a time.

ground floor, which data.py and hybrid_engine.py stand on
    flags             the flags that all stages share, their ranges, UsageError
    processes         start and end of a run, DeepSpeed's settings, collectives
    lora, models      adapters; Hugging Face folders in and out
    sources           --data_path -> rows: files, folders, hub names
    toy               the built-in task and its exact marks
upper floor, which stands on data.py and hybrid_engine.py
    metrics           the log, the summary, sampled answers
    checkpoints       --save_steps and --resume
    reward_functions  --reward_fn file.py:function
    preflight         what PPO checks before its first update
    doctor            what a run's metrics say about its health
    plan              --dry_run: memory, time, cost
    run_all           the two things that run_all.sh needs Python for
"""
