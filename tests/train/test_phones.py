import shutil

import pytest

from stepaudio.train.phones import parse, phones


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("w_,V_t I_z D_@2 k_'a_p_I_t#_@L\n", "w V t I z D @2 k a p I t# @L"),
        ("f_r_'aa_n_s__:__: a_n_d 'E_v_3_r-\n", "f r aa n s a n d E v 3 r"),
        ("tS;_'i55_n__| th_'iE51_n__| X_'Au214__| p_A11__|\n", "tS; i1 n th iE4 n X Au3 p A5"),
        ("(en)_h_@_l_'oU_(cmn)__| tS;h_'i35__|\n", "h @ l oU tS;h i2"),
        ("dZ_'i:_; 'E_m\n", "dZ i: E m"),
        ("", ""),
    ],
)
def test_output_of_espeak_becomes_phones(spelled, expected):
    assert " ".join(parse(spelled)) == expected


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_mandarin_is_read_as_mandarin():
    assert phones("你好", "zh")[0] == "n"
    assert not set(phones("法国的首都", "zh")) & {"T", "v", "dZ"}  # sounds of English alone
    assert phones("hello", "en") == ("h", "@", "l", "oU")
