"""Text pieces for a vocabulary that was not trained: characters, frequent words, letter groups.

Scores only order the pieces: longer ones are preferred, so that words stay whole where there is a piece.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterable

from stepaudio.export.vocabulary import FIRST_TEXT, WORD_MARK
from tokenizer.codes import LAYOUT

_WORDS = """
system human user assistant a about after again all also am an and any are as at audio back be because been before
big but by can capital city clock cold come could day did do does down each eat english every find first five for
four friend from get give go good great hand have he hear hello help her here him his home hot hour how i if in into
is it its just know last left let light like listen little long look made make man many may me minute more morning
most mother much music must my name near new next night nine no not now number of off old on one only open or other
our out over people place play please question read red right run said say school second see seven she should sing
six small so some song soon speak spell still story sun take talk tell ten than thank that the their them then there
these they thing think this three time timer to today told tomorrow too tool two under understand up us very voice
want was water way we weather well went were what when where which who why will with word work world would year yes
you young your zero
"""
_SENTENCES = """
今天天气很好，我们一起去公园走走吧。你叫什么名字？我的名字是小明，很高兴认识你！请问现在几点了，明天早上八点半提醒我。
北京、上海、广州和深圳都是大城市；春夏秋冬四季，东南西北四方，上下左右前后里外，大小多少高低长短快慢冷热新旧。
一二三四五六七八九十百千万零两半个只条张本次第年月日时分秒点钟星期周末昨晚中午下午。
父亲母亲爸爸妈妈哥哥姐姐弟弟妹妹儿子女儿老师学生朋友医生工人孩子先生小姐他她它们自己大家谁哪怎么样为什么因为所以但是如果就还也都不没有
红橙黄绿青蓝紫黑白灰色的花草树木山水火土金石头风雨雪云雷电太阳月亮星空海河江湖路桥门窗房屋桌椅床灯书笔纸
吃饭喝水茶酒菜肉鱼鸡蛋牛羊猪狗猫马鸟米面包果汁甜酸苦辣咸；看听说读写唱歌跳舞画画打开关闭来去回到走跑坐站睡觉起床穿衣洗手买卖给送拿放
请参考对话历史里的音色，用方式将文本内容大声说唱出来。哼作为一名卓越声优演员，你任务是根据中或括号内标注情感、语种方言、音乐调整等标签，
以丰富细腻和自然顺畅语调朗诵。包括限于：高兴生气悲伤撒娇英文韩国日本四川话粤广东。使用时确保意义得到准确而生动传达，则由演绎。
适配户言简短口化字答把这段录音转成识别翻译重复拼计算加减乘除等于故事从前有位住在村庄世界首都法德俄美意
"""


def small_text() -> dict[str, float]:
    """About a thousand pieces: ASCII, punctuation, some words and Chinese characters."""
    words = _WORDS.split()
    pieces = [
        *_printable(),
        *"，。？！：；、（）《》“”‘’…—·～",
        *dict.fromkeys(character for character in _SENTENCES if not character.isspace()),
        *(WORD_MARK + word for word in words),
        *(word for word in words if len(word) > 2),
        *(first + second for first in "bcdfghklmnprstw" for second in "aeiou"),
    ]
    return _scored(pieces)


def whole_text() -> dict[str, float]:
    """As many pieces as the release has text, so that audio begins at its id: all common characters first."""
    letters = string.ascii_lowercase
    pieces = itertools.chain(
        small_text(),
        map(chr, range(0x00A1, 0x0530)),  # Latin, Greek, Cyrillic
        map(chr, range(0x3041, 0x3100)),  # kana
        map(chr, range(0x4E00, 0xA000)),  # Chinese characters
        map(chr, range(0xAC00, 0xD7A4)),  # Korean syllables
        map(chr, range(0x3400, 0x4DC0)),  # rarer Chinese characters
        ("".join(pair) for pair in itertools.product(letters, letters)),
        (WORD_MARK + "".join(pair) for pair in itertools.product(letters, letters)),
        ("".join(three) for three in itertools.product(letters, repeat=3)),
        (WORD_MARK + "".join(three) for three in itertools.product(letters, repeat=3)),
    )
    distinct = dict.fromkeys(piece for piece in pieces if piece != WORD_MARK)
    return _scored(itertools.islice(distinct, LAYOUT.id_base - FIRST_TEXT))


def _printable() -> list[str]:
    return [character for character in string.printable if character.isprintable() and character != " "]


def _scored(pieces: Iterable[str]) -> dict[str, float]:
    """Log-probabilities: about -8 for a character and -1 more per further character, falling with the rank."""
    return {piece: -8.0 - 0.9 * (len(piece) - 1) - rank * 1e-4 for rank, piece in enumerate(dict.fromkeys(pieces))}
