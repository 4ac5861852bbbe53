"""Convolution and pooling of images, with explicit rules.

An image batch is (N, C, H, W). Every op here takes the windows of the image apart into one array per place in the
window, which is a slice of the image, and its rule adds gradients back to the same slices: a slice and its adjoint are
all the geometry there is.

In memory the batch comes last, (C, H, W, N): a slice along H and W then consists of long runs, which are quick to copy
and to add. Only views are turned, so the shape stays (N, C, H, W); what elementwise ops make of such an array keeps its
order, and the images are rearranged once, when they enter the first convolution.
"""

from __future__ import annotations

from collections.abc import Iterator

from .backend import Array, array_module, check_integers
from .tensor import op


@op
def conv2d(x, w, b, *, stride: int = 1, padding: int = 0):
    """y[n,o,p,q] = b[o] + Σ_{c,i,j} w[c,i,j,o] x[n,c,sp+i,sq+j],  s the stride, x with `padding` zeros on each side.

    x (N, C, H, W)   w (C, I, J, O)   b (O,)   ->   y (N, O, (H + 2·padding − I)//s + 1, (W + 2·padding − J)//s + 1)

    With the windows of x as the columns X (CIJ, PQN) and w as a matrix (CIJ, O):
    forward:   y = wᵀ X + b
    backward:  dw = X gᵀ      db = Σ g      dX = w g, of which each row is added to the slice of x that it came from

    (The kernel is not flipped, as in all libraries of the field. PyTorch's weight is (O, C, I, J).)
    ValueError for shapes that do not fit, a stride below 1 or a padding below 0; TypeError if these are no integers.
    """
    if x.ndim != 4 or w.ndim != 4 or x.shape[1] != w.shape[0] or b.shape != w.shape[3:]:
        raise ValueError(f"x (N, C, H, W), w (C, I, J, O) and b (O,) must fit: {x.shape}, {w.shape}, {b.shape}.")
    xp, (C, I, J, O) = array_module(x), w.shape
    batch_last = _pad(x.transpose(1, 2, 3, 0), padding)
    places = list(_places(batch_last.shape, (I, J), stride))
    P, Q, N = batch_last[places[0]].shape[1:]
    X = xp.empty((C, I * J, P, Q, N), dtype=x.dtype)
    for n, place in enumerate(places):
        X[:, n] = batch_last[place]
    X = X.reshape(C * I * J, P * Q * N)
    y = w.reshape(C * I * J, O).T @ X
    y += b[:, None]

    def backward(g):
        g = xp.ascontiguousarray(g.transpose(1, 2, 3, 0)).reshape(O, P * Q * N)

        def dx():
            dX = (w.reshape(C * I * J, O) @ g).reshape(C, I * J, P, Q, N)
            padded = xp.zeros(batch_last.shape, dtype=x.dtype)
            for n, place in enumerate(places):
                padded[place] += dX[:, n]
            H, W = x.shape[2:]
            return padded[:, padding : padding + H, padding : padding + W].transpose(3, 0, 1, 2)

        dw = lambda out=None: xp.matmul(X, g.T, out=out if out is None else out.reshape(C * I * J, O)).reshape(w.shape)
        return dx, dw, lambda out=None: g.sum(axis=1, out=out)

    return y.reshape(O, P, Q, N).transpose(3, 0, 1, 2), backward


@op
def max_pool2d(x, *, size: int = 2, stride: int | None = None):
    """The largest of each window.   x (N, C, H, W) -> (N, C, (H − size)//stride + 1, (W − size)//stride + 1)

    size: of the windows, which are squares.   stride: how far they are apart; None for `size`, so that they lie side by
    side. Rows and columns that are left over are not looked at.
    Of several that are largest, the first one, row by row, gets the whole gradient, as in PyTorch.
    ValueError for a window that does not fit, TypeError for settings that are no integers.
    """
    xp, batch_last = array_module(x), _image(x).transpose(1, 2, 3, 0)
    places = list(_places(batch_last.shape, (size, size), size if stride is None else stride))
    y = batch_last[places[0]].copy()
    for place in places[1:]:
        xp.maximum(y, batch_last[place], out=y)

    def backward(g):
        dx = xp.zeros(batch_last.shape, dtype=x.dtype)
        g, free = g.transpose(1, 2, 3, 0), xp.ones(y.shape, dtype=bool)
        for place in places:
            first = free & (batch_last[place] == y)
            dx[place] += g * first
            free &= ~first
        return dx.transpose(3, 0, 1, 2)

    return y.transpose(3, 0, 1, 2), backward


@op
def avg_pool2d(x, *, size: int = 2, stride: int | None = None):
    """The mean of each window of size × size; shapes, stride and errors as for `max_pool2d`."""
    xp, batch_last = array_module(x), _image(x).transpose(1, 2, 3, 0)
    places = list(_places(batch_last.shape, (size, size), size if stride is None else stride))
    y = batch_last[places[0]].copy()
    for place in places[1:]:
        y += batch_last[place]
    y *= 1.0 / size**2

    def backward(g):
        dx = xp.zeros(batch_last.shape, dtype=x.dtype)
        share = g.transpose(1, 2, 3, 0) * (1.0 / size**2)
        for place in places:
            dx[place] += share
        return dx.transpose(3, 0, 1, 2)

    return y.transpose(3, 0, 1, 2), backward


def _places(shape: tuple[int, ...], window: tuple[int, int], stride: int) -> Iterator[tuple[slice, ...]]:
    """For each place in a window, row by row, the slice of an image (C, H, W, N) that all windows have there."""
    for number in (stride, *window):
        check_integers(number)
        if number < 1:
            raise ValueError(f"windows and strides must be at least 1, got {window[0]} × {window[1]} and {stride}.")
    lengths = [(n - k) // stride + 1 for n, k in zip(shape[1:3], window, strict=True)]
    if min(lengths) < 1:
        raise ValueError(f"a window of {window[0]} × {window[1]} does not fit into images of {shape[1]} × {shape[2]}.")
    for i in range(window[0]):
        for j in range(window[1]):
            rows, columns = (
                slice(at, at + stride * (n - 1) + 1, stride) for at, n in zip((i, j), lengths, strict=True)
            )
            yield slice(None), rows, columns


def _image(x: Array) -> Array:
    if x.ndim != 4:
        raise ValueError(f"images must be (N, C, H, W), got {x.shape}: reshape them first.")
    return x


def _pad(batch_last: Array, padding: int) -> Array:
    """A contiguous copy of (C, H, W, N) between zeros, or the array itself where nothing changes."""
    xp = array_module(batch_last)
    check_integers(padding)
    if padding < 0:
        raise ValueError(f"the padding must be at least 0, got {padding}.")
    if not padding:
        return xp.ascontiguousarray(batch_last)
    C, H, W, N = batch_last.shape
    padded = xp.zeros((C, H + 2 * padding, W + 2 * padding, N), dtype=batch_last.dtype)
    padded[:, padding : padding + H, padding : padding + W] = batch_last
    return padded
