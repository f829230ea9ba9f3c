"""What the parts of the platform cost, beside what a user would do without them; jobs/benchmark_*.py run it.

Both sides of every comparison do the same work, say so where they do not, and take turns while they are timed.

    job.py            a benchmark as a program: settings in, one JSON line out
    process_cost.py   CPU time of a tree of processes
Data:
    decode_cost.py    a video beside decord, PIL and numpy (long_clips.py: the clips)
    prepare_cost.py   many videos on Ray beside a plain loop and a pool
Model:
    forward_cost.py   a forward pass beside the same modules called by hand
Training: train/
Serving:
    engine_cost.py    an engine's tokens beside sequential `generate`
    serve/            whole servers over HTTP
"""
