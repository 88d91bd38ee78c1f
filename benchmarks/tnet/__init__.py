"""T-Net (Kossaifi, Bulat, Tzimiropoulos and Pantic, CVPR 2019): a network whose kernels are one low-rank tensor,
trained from scratch.
"""
