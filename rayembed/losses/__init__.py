"""Losses: pure functions of scores or vectors, which know neither models nor ranks.

To add one, write the function, its setting in config/train.py, and, if it learns from a teacher, a row in KD_LOSSES.
"""

from rayembed.losses.contrastive import FourWays, improved_info_nce, info_nce, symmetric_info_nce
from rayembed.losses.distillation import kl_div, m3_kd_loss, margin_mse
from rayembed.losses.m3 import m3_loss
from rayembed.losses.masks import by_keys, by_margin, share_keys, up_to
from rayembed.losses.matryoshka import beginnings
from rayembed.losses.reranking import pointwise_bce
from rayembed.losses.scored_pairs import angle, cosent
from rayembed.losses.sparse import flops

KD_LOSSES = {"kl_div": kl_div, "m3_kd_loss": m3_kd_loss, "margin_mse": margin_mse}

__all__ = [
    "KD_LOSSES",
    "FourWays",
    "angle",
    "beginnings",
    "by_keys",
    "by_margin",
    "cosent",
    "flops",
    "improved_info_nce",
    "info_nce",
    "kl_div",
    "m3_kd_loss",
    "m3_loss",
    "margin_mse",
    "pointwise_bce",
    "share_keys",
    "symmetric_info_nce",
    "up_to",
]
