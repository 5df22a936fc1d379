"""Staging: the host memory that a save is copied to, so that training goes on while a thread writes it."""

from math import prod

import torch

from gpt4moe.checkpoint.storage import Piece


class Staging:
    """One host buffer for what a rank owns (12 bytes a parameter), taken at the first save and used again ever after.

    Its bound is that size: a new save waits until the one before has left the buffer.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(0)

    def copy(self, pieces: list[Piece]) -> list[Piece]:
        """The same pieces with their values in the buffer, all there when this returns."""
        total = sum(prod(piece.shape) for piece in pieces)
        devices = {piece.values.device for piece in pieces if piece.values.is_cuda}
        if self.buffer.numel() < total:
            self.buffer = torch.empty(0)  # freed before its successor is taken
            self.buffer = torch.empty(total, dtype=torch.float32, pin_memory=bool(devices))
        staged, end = [], 0
        for piece in pieces:
            start, end = end, end + prod(piece.shape)
            values = self.buffer[start:end]
            values.copy_(piece.values.detach().reshape(-1), non_blocking=True)
            staged.append(Piece(piece.tensor, piece.global_shape, piece.offset, piece.shape, values))
        for device in devices:
            torch.cuda.synchronize(device)
        return staged
