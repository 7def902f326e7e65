"""Decodes WebP while other threads run: Pillow holds the interpreter's lock for it.

A lossless image of 32 megapixels is 40 bytes and held all threads of a server for 0.6 s. The calls
here are those of Pillow's `_webp.c`, to the library that Pillow has loaded.
"""

from __future__ import annotations

import ctypes
from typing import Any

from PIL import WebPImagePlugin

DEMUX_ABI = 0x0107
"""WEBP_DEMUX_ABI_VERSION of libwebp's demux.h; its first byte has to be the library's."""
MODE_RGBA = 1
"""WEBP_CSP_MODE of libwebp's decode.h."""


class _Data(ctypes.Structure):
    """WebPData of mux_types.h."""

    _fields_ = (("bytes", ctypes.c_char_p), ("size", ctypes.c_size_t))


class _Options(ctypes.Structure):
    """WebPAnimDecoderOptions of demux.h."""

    _fields_ = (
        ("color_mode", ctypes.c_int),
        ("use_threads", ctypes.c_int),
        ("padding", ctypes.c_uint32 * 7),
    )


def _library() -> Any:
    """libwebpdemux, as a dependency of Pillow's module; None where it cannot be called."""
    try:
        from PIL import _webp

        library = ctypes.CDLL(_webp.__file__)
        library.WebPAnimDecoderNewInternal.restype = ctypes.c_void_p
        for name, pointers in (("GetNext", 3), ("Reset", 1), ("Delete", 1)):
            getattr(library, f"WebPAnimDecoder{name}").argtypes = [ctypes.c_void_p] * pointers
    except (ImportError, OSError, AttributeError):  # linked into the module, as on Windows
        return None
    return library


LIBRARY = _library()
_new_bytes = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)


class _Decoder:
    """The part of Pillow's `WebPAnimDecoder` that decodes. data: the whole file."""

    def __init__(self, data: bytes, size: tuple[int, int]) -> None:
        self._data, self._bytes = data, 4 * size[0] * size[1]  # libwebp keeps pointers into it
        options = _Options(MODE_RGBA, 0)
        self._handle = LIBRARY.WebPAnimDecoderNewInternal(
            ctypes.byref(_Data(data, len(data))), ctypes.byref(options), DEMUX_ABI
        )

    def __bool__(self) -> bool:
        return bool(self._handle)

    def __del__(self) -> None:
        LIBRARY.WebPAnimDecoderDelete(self._handle)

    def get_next(self) -> tuple[bytes, int] | None:
        """The next frame's pixels as RGBA, and when it ends in milliseconds; None for damage."""
        pixels, end = ctypes.c_void_p(), ctypes.c_int()
        if not LIBRARY.WebPAnimDecoderGetNext(
            self._handle, ctypes.byref(pixels), ctypes.byref(end)
        ):
            return None
        data = _new_bytes(None, self._bytes)
        ctypes.memmove(data, pixels, self._bytes)  # also without the lock, unlike `string_at`
        return data, end.value

    def reset(self) -> None:
        LIBRARY.WebPAnimDecoderReset(self._handle)


def release_interpreter(image: WebPImagePlugin.WebPImageFile, data: bytes) -> None:
    """Let an opened WebP, `data`, be decoded without the interpreter's lock, where possible."""
    if LIBRARY is not None and (decoder := _Decoder(data, image.size)):
        image._decoder = decoder
