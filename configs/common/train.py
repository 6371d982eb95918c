"""What the training loop reads, with its defaults."""

import torch

train = dict(
    output_dir="./output",
    # Weights to start from: a file, a detectron2:// name, or "" for random weights.
    init_checkpoint="",
    # Patterns of the names that init_checkpoint may lack, which then keep their random start, and of those that may be
    # of another shape there. Anything else that does not fit is an error.
    init_may_lack=[
        "sem_seg_head.*",
        "proposal_generator.*",
        "roi_heads.*",
        "backbone.fpn_*",
        "*.rcca.*",
        "*.nl.*",
        "*.num_batches_tracked",
    ],
    init_may_differ=[],
    # Run the code in an init_checkpoint that cannot be read without it: only for files from people you trust.
    allow_pickle=False,
    max_iter=60000,
    # bf16 (or fp16 where a GPU has no bf16) autocast; works on CPUs too. dtype: "auto", "bfloat16" or "float16".
    amp=dict(enabled=False, dtype="auto"),
    # Run the model through torch.compile, for the size of the crops; the first step then takes minutes.
    compile=False,
    clip_grad_norm=None,
    # How many batches of the run may be dropped because a loss or gradient is not finite; 0: the first one stops it.
    non_finite_retries=0,
    # What to do about an image or label that cannot be used: "stop", or "skip" up to so many different ones.
    on_bad_sample="stop",
    bad_sample_budget=100,
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=5000, max_to_keep=3),
    # Evaluate every so many iterations, and always after the last one; 0 for the end only.
    eval_period=5000,
    log_period=20,
    # Pictures of predictions drawn after each evaluation, of label maps or of instances; 0 for none.
    num_pictures=4,
    device="cuda" if torch.cuda.is_available() else "cpu",
    # Any number from 0 makes data order, augmentation and initial weights repeat.
    seed=-1,
    # Refuse operations whose result may differ from run to run, and choose none by timing (cudnn_benchmark).
    deterministic=False,
    cudnn_benchmark=True,
)
