"""Whether a text is English, told by the small words that every language has.

Pure and coarse: a text too short to tell passes, and names prove nothing.
"""

import re
import unicodedata

from dalign.text import words

# Small words of languages in Latin script; those of several languages count for none.
_ENGLISH = frozenset(
  (
    "the of and to a in is it you that he was for on are with as i his they be at one"
    " have this from or had by not but what all were we when your can said there an"
    " which she do how their if will up other about out many then them so some her"
    " would him has more no my than who its now did get may i'm can't don't it's"
    " cannot sorry any because could should these into just only very also me us our"
    " been"
  ).split()
)
_OTHERS = (
  # Dutch
  "de het een en van ik te dat die niet zijn op aan met voor er maar om ook als je"
  " bij naar kan geen deze hoe wat spijt helaas uw in is was we daar mij wij",
  # French
  "le la les de des du un une et est je ne pas que qui dans pour vous il elle en au"
  " aux ce cette avec sur par plus ou mais nous peux désolé votre vos être sont suis"
  " puis cela ça on me si",
  # German
  "der die das und ist nicht ich ein eine einen zu mit den dem von auf für sie es wir"
  " leider kann dir ihnen bei wie oder aber auch wird sind dass nach tut mir leid"
  " keine in an so was am man",
  # Indonesian
  "yang dan di ini itu tidak untuk dengan saya anda dari ke pada bisa adalah akan"
  " dapat maaf tentang atau membantu",
  # Italian
  "il lo la gli le di che non un una per con mi sono è ho e posso questo questa del"
  " della dei ti si come più ma anche dispiace da nel a i in al dalla alla mio mia suo"
  " sua cosa qual quali fare chi senza me",
  # Javanese
  "lan ing sing iku ora saka kanggo karo aku sampeyan bisa iki ana nyuwun apa piye"
  " carane kowe wong nggawe supaya kudu yen dadi luwih menyang",
  # Polish
  "nie się na jest to że do jak ale po przykro mogę przepraszam tym dla być co czy są",
  # Portuguese
  "os de da do das dos um uma que não para com por em eu você se é mas como mais isso"
  " esta este posso sinto desculpe lamento seu sua ao na a as no me",
  # Scandinavian
  "och att det som en är jag inte på för med den till av kan og jeg ikke er har du om"
  " beklager tyvärr men ett et hjelpe hjälpa i at her",
  # Spanish
  "el la los las de que en un una no es por con para lo se puedo siento del al como"
  " más pero sus su le ya este esta eso ayudarte ayudar ti mi tu te a me he",
  # Swahili
  "na ya wa kwa ni katika kuwa hii la za siwezi samahani hiyo au kama ili jinsi gani"
  " nini mtu watu wangu yangu je ninawezaje cha vya kutoka bila",
  # Turkish
  "ve bir bu için da ne ile ama çok daha var ben üzgünüm olarak gibi değil",
  # Vietnamese
  "không là và của tôi bạn có thể một này cho được với trong xin lỗi các người làm"
  " nào để những gì cách đó",
)
_SMALL = [frozenset(text.split()) for text in _OTHERS]
_THEIRS = [small - _ENGLISH for small in _SMALL]
_OURS = _ENGLISH.difference(*_SMALL)
_LANGUAGE = (
  r"(?:arabic|bengali|chinese|czech|danish|dutch|finnish|french|german|greek|hebrew"
  r"|hindi|hungarian|indonesian|italian|japanese|javanese|korean|latin|mandarin"
  r"|norwegian|persian|polish|portuguese|russian|spanish|swahili|swedish|thai|turkish"
  r"|ukrainian|urdu|vietnamese)"
)
_TRANSLATES = re.compile(
  rf"\btranslat|\b(?:in|into|to|from) {_LANGUAGE}\b|\bhow (?:do|would) (?:you|i|we) say"
  rf"|\b{_LANGUAGE} (?:for|greeting|name|phrase|poem|sentence|text|version|word)"
)
_QUOTED = re.compile(r'"[^"]*"|«[^»]*»')


def english(text: str) -> bool:
  """Whether `text` may be English, as what is too short to tell ("Das Boot", "42") may.

  It is not where most letters are of another script, nor where small words of one other
  language are more than those of English, be it two or, where English has next to none,
  one. A few of them in a long text (names, code) say nothing, nor does what is quoted.
  """
  said = _QUOTED.sub(" ", words.plain(text))
  text = said if words.words(said) else text
  letters = [c for c in text if c.isalpha()]
  latin = sum(c.isascii() or "LATIN" in unicodedata.name(c, "") for c in letters)
  if latin * 2 < len(letters):
    return False
  found = words.words(text)
  ours = sum(word in _OURS for word in found)
  theirs = max(sum(word in small for word in set(found)) for small in _THEIRS)
  enough = 1 if len(found) >= 6 and ours * 12 < len(found) else 2
  return theirs < max(enough, min(len(found) / 20, 8)) or theirs <= ours


def asks_translation(prompt: str) -> bool:
  """Whether a prompt asks for words of another language."""
  return bool(_TRANSLATES.search(words.plain(prompt).casefold()))
