"""
What a run needs that is not RLHF. Skip it on a first reading, and come back for one room at a time.

ground floor, which data.py and hybrid_engine.py stand on
    flags             the flags that all stages share, their ranges, UsageError
    other_names       what other programs call them
    terminal          the live line
    processes         start and end of a run, DeepSpeed's settings, collectives
    lora, models      adapters; Hugging Face folders in and out
    sources           --data_path -> rows: files, folders, hub names
    forms             the rows of public data sets -> records
    cache             rows are prepared once a host
    toy               the built-in task and its exact marks
upper floor, which stands on data.py and hybrid_engine.py
    metrics           numbers over ranks, the summary, sampled answers
    log               metrics, evaluations and samples in files, on the terminal, in monitors
    model_card        README.md of a saved model
    checkpoints       --save_steps and --resume
    reward_functions  --reward_fn file.py:function
    preflight         what PPO checks before its first update
    doctor            what a run's metrics say about its health
    report            a run, or several compared, as one HTML page
    runs, plots       what it reads, and what it draws
    plan              memory at each moment of a stage, and its FLOP, from shapes
    dry_run           --dry_run: does it fit, what does, hours and dollars
    run_all, table    what run_all.sh needs Python for: checks and plans, the table of results
    serve             chat.py --serve: OpenAI's protocol, and the page chat.html
"""
