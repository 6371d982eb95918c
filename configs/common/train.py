"""What the training loop reads, with its defaults."""

import torch

train = dict(
    output_dir="./output",
    # Weights to start from: a file, a detectron2:// name, or "" for random weights.
    init_checkpoint="",
    max_iter=60000,
    # bf16 (or fp16 where a GPU has no bf16) autocast; works on CPUs too. dtype: "auto", "bfloat16" or "float16".
    amp=dict(enabled=False, dtype="auto"),
    clip_grad_norm=None,
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=5000, max_to_keep=3),
    # Evaluate every so many iterations, and always after the last one; 0 for the end only.
    eval_period=5000,
    log_period=20,
    # Pictures of predictions drawn after each evaluation; 0 for none.
    num_pictures=4,
    device="cuda" if torch.cuda.is_available() else "cpu",
    # Any number from 0 makes data order, augmentation and initial weights repeat.
    seed=-1,
    cudnn_benchmark=True,
)
