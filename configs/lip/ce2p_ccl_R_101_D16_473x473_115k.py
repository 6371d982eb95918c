"""CE2P with RCCA (R=2) and the category consistent loss on LIP as in the paper (TPAMI, Tab. 7: 55.47)."""

from .ce2p_R_101_D16_473x473_115k import dataloader, lr_multiplier, model, optimizer, test, train

model.sem_seg_head.category_consistent = "piecewise"
