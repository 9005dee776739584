"""Text in pictures without a font file: letters of 5 by 7 dots, some of which reach lower."""

from __future__ import annotations

import unicodedata

import numpy as np
from numpy.typing import NDArray

#: A character and its seven rows of five bits, two hexadecimal digits each.
_FONT = """
A0E11111F111111 B1E11111E11111E C0E11101010110E D1E11111111111E E1F10101E10101F F1F10101E101010
G0E11101711110E H1111111F111111 I0E04040404040E J0702020202120C K11121418141211 L1010101010101F
M111B1515111111 N11111915131111 O0E11111111110E P1E11111E101010 Q0E11111115120D R1E11111E141211
S0F10100E01011E T1F040404040404 U1111111111110E V11111111110A04 W11111115151B11 X11110A040A1111
Y11110A04040404 Z1F01020408101F a00000E010F110F b10101E1111111E c00000F1010100F d01010F1111110F
e00000E111F100E f06081E08080808 g0F11110F01010E h10101E11111111 i04000C0404040E j0200060202120C
k10101214181412 l0C04040404040E m00001A15151515 n00001E11111111 o00000E1111110E p1E11111E101010
q0F11110F010101 r00001619101010 s00000F100E011E t08081E08080806 u0000111111110F v00001111110A04
w0000111115150A x0000110A040A11 y111111110F010E z00001F0204081F 00E11131519110E 1040C040404040E
20E11010608101F 30E11010601110E 402060A121F0202 51F101E0101110E 60608101E11110E 71F010204080808
80E11110E11110E 90E11110F01020C .00000000000C0C ,000000000C0408 -0000001F000000 +0004041F040400
/01010204081010 :000C0C000C0C00 (02040808080402 )08040202020408 %18190204081303 =00001F001F0000
_0000000000001F
"""
_GLYPHS = {
    word[0]: np.array(
        [[int(word[1 + 2 * r : 3 + 2 * r], 16) >> (4 - n) & 1 for n in range(5)] for r in range(7)],
        bool,
    )
    for word in _FONT.split()
}
_UNKNOWN = np.ones((7, 5), bool)
_LOW = "gpqy"  # letters that reach two dots below the line


def letters(text: str, scale: int = 2) -> NDArray[np.bool_]:
    """(9 * scale, columns) dots of a line of text; accents are dropped, characters without a glyph
    become blocks.
    """
    plain = [c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)]
    dots = np.zeros((9, max(0, 6 * len(plain) - 1)), bool)
    for n, character in enumerate(plain):
        if character != " ":
            top = 2 if character in _LOW else 0
            dots[top : top + 7, 6 * n : 6 * n + 5] = _GLYPHS.get(character, _UNKNOWN)
    return np.kron(dots, np.ones((scale, scale), bool))


def write_text(
    picture: NDArray[np.uint8],
    row: int,
    column: int,
    text: str,
    color: tuple[int, int, int],
    scale: int = 2,
) -> int:
    """Write a line of text into an RGB picture, its top left corner at (row, column); the column
    where it ends.

    What does not fit is cut off.
    """
    dots = letters(text, scale)
    part = picture[row : row + dots.shape[0], column : column + dots.shape[1]]
    part[dots[: part.shape[0], : part.shape[1]]] = color
    return column + dots.shape[1]
