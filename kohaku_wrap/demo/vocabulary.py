"""The tags of the embedded world: all five types, with the odd ones that captions must get right."""

from __future__ import annotations

from dataclasses import dataclass

GENERAL, ARTIST, CHARACTER, COPYRIGHT, META = range(5)
"""Tag types as numbered in the database."""


def split_names(text: str) -> list[str]:
    """The names of a block of text; no tag holds a blank."""
    return text.split()


PEOPLE: tuple[tuple[str, ...], ...] = (
    ("1girl", "solo"),
    ("1girl", "solo"),
    ("1girl", "solo", "solo_focus"),
    ("1boy", "solo", "male_focus"),
    ("2girls", "multiple_girls"),
    ("1girl", "1boy", "hetero"),
    ("3girls", "multiple_girls"),
    ("2boys", "multiple_boys"),
    ("1other", "solo"),
    ("6+girls", "multiple_girls"),
    ("no_humans",),
)

GENERAL_TAGS = split_names(
    """
long_hair looking_at_viewer smile blush short_hair open_mouth blue_eyes simple_background shirt skirt blonde_hair
brown_hair black_hair white_background hair_ornament red_eyes bow dress gloves thighhighs hat long_sleeves ribbon
brown_eyes holding animal_ears very_long_hair standing sitting jewelry green_eyes purple_eyes school_uniform
closed_mouth twintails ponytail full_body upper_body weapon white_shirt closed_eyes yellow_eyes blue_hair pink_hair
purple_hair white_hair silver_hair red_hair green_hair grey_hair grey_background jacket tail hair_bow flower
braid sky cloud tree outdoors indoors day night water ocean beach snow rain moon star_(sky) sunset window table chair
book cup umbrella sword wings horns halo glasses scarf boots shoes necktie detached_sleeves bare_shoulders
wide_sleeves kimono japanese_clothes hood coat pants shorts socks pantyhose sweater vest apron maid_headdress crown
earrings necklace choker hairband hairclip ahoge sidelocks bangs blunt_bangs heart musical_note petals leaf butterfly
cat dog bird fish rabbit horse dragon robot car train city street building mountain field grass river bridge
fire lightning light_particles depth_of_field from_above from_side from_behind cowboy_shot portrait close-up
blurry_background monochrome greyscale sketch chibi parody letterboxed hand_up arms_up peace_sign v pointing running
jumping flying lying sleeping eating drinking reading singing dancing waving crying laughing angry surprised
"""
)

EMOTICONS = split_names(
    r"""
>_< ^_^ @_@ o_o +_+ ._. =_= u_u x_x 3_3 0_0 ||_|| |_| <|>_<|> <o>_<o> :| ;| \||/ :d :3 :o ;d xd ^^^ !? ... n_u m_k
"""
)

SERIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("garden_of_glass", ("aoi_(garden_of_glass)", "mika_(garden_of_glass)", "shirane_yuu")),
    ("iron_harbor", ("captain_rell", "rell_(swimsuit)_(iron_harbor)", "ondine_(iron_harbor)")),
    ("tea_time_planet", ("pekoe", "earl_grey_(tea_time_planet)", "robot_7")),
    ("night_express:_zero", ("conductor_(night_express)", "lamp_girl", "k.t._minus")),
    ("original", ()),
    ("paper_moon_(series)", ("luna_(paper_moon)", "origami_fox")),
    ("star_&_river", ("orihime-chan", "hikoboshi")),
)
"""Copyrights with their characters."""

ARTISTS = split_names(
    """
kumo_no_ito hoshizora_neko tamago_(yude) brushed_teal m-kishi ryokucha_3000 pixel_mori ao&aka nakamura_(studio_n)
banned_artist yuki_usagi! old_lantern same_name_banned-upload kurage ten_to_sen
"""
)

META_TAGS = split_names(
    """
highres absurdres commentary_request commentary translation_request translated bad_id bad_pixiv_id watercolor_(medium)
photoshop_(medium) official_art scan game_cg md5_mismatch revision duplicate animated video sound audio_sample
third-party_edit english_commentary 4koma_series wallpaper tagme
"""
)


@dataclass(frozen=True)
class Tag:
    """One row of the tag table."""

    id: int
    """Ascending with the list below, as on a site where older tags are the common ones."""

    name: str
    """With underscores, as in the database."""

    type: int
    """0 general, 1 artist, 2 character, 3 copyright, 4 meta."""


def list_tags() -> list[Tag]:
    """All tags of the world; ids from 1."""
    people = list(dict.fromkeys(name for names in PEOPLE for name in names))
    named = [(name, GENERAL) for name in (*people, *GENERAL_TAGS, *EMOTICONS)]
    named += [(name, ARTIST) for name in ARTISTS]
    named += [(name, CHARACTER) for _, characters in SERIES for name in characters]
    named += [(name, COPYRIGHT) for name, _ in SERIES]
    named += [(name, META) for name in META_TAGS]
    return [Tag(index, name, kind) for index, (name, kind) in enumerate(dict(named).items(), start=1)]
