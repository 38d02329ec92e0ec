"""SQL for the value of a column, however a dump holds it: in sqlite, and in DuckDB."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import pyarrow as pa

from kohaku_wrap.metadata.filters import NO_WORDS, YES_WORDS, quote

MONTHS = "JanFebMarAprMayJunJulAugSepOctNovDec"
LOCAL_TIME = "%Y-%m-%dT%H:%M:%S.%g"
"""How DuckDB writes what has a type of dates; texts stay as they are."""


def name_sql(name: str) -> str:
    """The name of a table or column as an identifier of SQL."""
    return '"' + name.replace('"', '""') + '"'


def truth_of(number: str) -> str:
    """1 and 0 as they are; any other number says neither yes nor no."""
    return f"CASE ({number}) WHEN 1 THEN CAST(1 AS BIGINT) WHEN 0 THEN CAST(0 AS BIGINT) END"


def seconds_of(number: str) -> str:
    """Seconds since 1970, which some sites count in, and some in milliseconds."""
    return f"CASE WHEN abs({number}) > 100000000000 THEN {number} / 1000 ELSE {number} END"


class Dialect(ABC):
    """Expressions over columns by name; what cannot be read is NULL, or '' for texts."""

    @abstractmethod
    def number(self, column: str) -> str:
        """The whole number, NULL where there is none: '', words, fractions, blobs.

        '5' and '5.0' are numbers as CSV files have them; nothing is guessed from the beginning of a text.
        """

    @abstractmethod
    def flag(self, column: str) -> str:
        """1, 0, or NULL where it is unknown."""

    def flag_of_word(self, word: str, column: str) -> str:
        """The cases of a flag for what a column says in words; of any other word its number counts."""
        return (
            f"WHEN {word} IN ({', '.join(map(quote, YES_WORDS))}) THEN 1 "
            f"WHEN {word} IN ({', '.join(map(quote, NO_WORDS))}) THEN 0 "
            f"ELSE {truth_of(self.number(column))} END"
        )

    @abstractmethod
    def text(self, column: str) -> str:
        """The text, '' for NULL."""

    @abstractmethod
    def date(self, column: str) -> str:
        """The moment of upload as text: as written, `YYYY-MM-DDThh:mm:ss.mmm` with the offset where one is known."""

    @abstractmethod
    def day(self, date: str) -> str:
        """The YYYY-MM-DD that the text of a date begins with, NULL where there is no such day."""

    def column(self, name: str) -> str:
        """A column by its name in the table, as the other methods take it."""
        return name

    def absent(self, column: str) -> str:
        """What stands for a column of posts that the table does not have."""
        return f"CAST(NULL AS {'VARCHAR' if column in ('md5', 'file_url') else 'BIGINT'})"

    def size(self, column: str) -> str:
        """A width or height in pixels, NULL where it is unknown, as 0 is."""
        number = self.number(column)
        return f"CASE WHEN ({number}) > 0 THEN ({number}) END"

    def tags(self, columns: Sequence[str], by_commas: bool) -> str:
        """The tags of one or more columns with blanks between them."""
        texts = [self.text(column) for column in columns]
        if by_commas:
            texts = [f"replace(replace(replace({text}, ', ', ','), ' ', '_'), ',', ' ')" for text in texts]
        return " || ' ' || ".join(texts) or "''"

    def rating(self, column: str, words: Mapping[str, int]) -> str:
        """0 … 3, -1 for unknown; by number, or by the `words` in small letters where there are any."""
        number = self.number(column)
        by_number = f"CASE WHEN ({number}) IN (0, 1, 2, 3) THEN ({number}) ELSE -1 END"
        if not words:
            return by_number
        cases = " ".join(f"WHEN {quote(word)} THEN {rating}" for word, rating in words.items())
        return f"CASE lower(trim({self.text(column)})) {cases} ELSE {by_number} END"

    @staticmethod
    def extension(text: str) -> str:
        """What follows the last dot of a file's name or address."""
        return f"replace({text}, rtrim({text}, replace({text}, '.', '')), '')"

    @staticmethod
    def clock_date(text: str) -> str:
        """A date such as `Sat Oct 14 17:46:14 -0500 2023`, written as the others are."""
        month = f"(instr('{MONTHS}', substr({text}, 5, 3)) + 2) / 3"
        digits = f"substr('0' || CAST(CAST({month} AS INTEGER) AS TEXT), -2, 2)"
        written = (
            f"substr({text}, 27, 4) || '-' || {digits} || '-' || substr({text}, 9, 2) || 'T' || "
            f"substr({text}, 12, 8) || '.000' || substr({text}, 21, 3) || ':' || substr({text}, 24, 2)"
        )
        known = f"length({text}) = 30 AND instr('{MONTHS}', substr({text}, 5, 3)) % 3 = 1"
        return f"CASE WHEN {known} THEN {written} ELSE {text} END"


class Sqlite(Dialect):
    """sqlite, where each value has a type of its own."""

    def column(self, name: str) -> str:
        return name_sql(name)

    def number(self, column: str) -> str:
        text = self._trimmed(column)
        number = f"CAST(CAST({text} AS INTEGER) AS TEXT)"
        return (
            f"CASE typeof({column}) WHEN 'integer' THEN {column} "
            f"WHEN 'real' THEN CASE WHEN {column} = CAST({column} AS INTEGER) THEN CAST({column} AS INTEGER) END "
            f"WHEN 'text' THEN CASE WHEN {text} IN ({number}, {number} || '.0') THEN CAST({text} AS INTEGER) END END"
        )

    def flag(self, column: str) -> str:
        of_word = self.flag_of_word(f"lower({self._trimmed(column)})", column)
        return f"CASE WHEN typeof({column}) <> 'text' THEN {truth_of(self.number(column))} {of_word}"

    def text(self, column: str) -> str:
        return f"CAST(coalesce({column}, '') AS TEXT)"

    def date(self, column: str) -> str:
        moment = f"coalesce(strftime('%Y-%m-%dT%H:%M:%S.000+00:00', {seconds_of(column)}, 'unixepoch'), '')"
        text = self.clock_date(self.text(column))
        return f"CASE WHEN typeof({column}) IN ('integer', 'real') THEN {moment} ELSE {text} END"

    def day(self, date: str) -> str:
        # sqlite gives NULL for what is no date, and another day for the 31st of June once days are added.
        start = f"substr({date}, 1, 10)"
        return f"CASE WHEN date({start}, '+0 days') = {start} THEN {start} END"

    @staticmethod
    def _trimmed(column: str) -> str:
        return f"trim({column}, ' ' || char(9, 10, 13))"


class Duck(Dialect):
    """DuckDB, where each column has a type."""

    def __init__(self, columns: Mapping[str, tuple[str, pa.DataType]]) -> None:
        """`columns`: by name, the SQL for the column, such as the way into a structure, and its type."""
        self._columns = columns

    def number(self, column: str) -> str:
        name, kind = self._columns[column]
        if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
            return f"TRY_CAST({name} AS BIGINT)"
        if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            return f"CASE WHEN {name} = floor({name}) THEN TRY_CAST({name} AS BIGINT) END"
        if is_text(kind):
            text = self._trimmed(name)
            return (
                f"CASE WHEN regexp_full_match({text}, '(0|-?[1-9][0-9]*)([.]0)?') "
                f"THEN TRY_CAST(regexp_replace({text}, '[.]0$', '') AS BIGINT) END"
            )
        return "CAST(NULL AS BIGINT)"

    def flag(self, column: str) -> str:
        name, kind = self._columns[column]
        if not is_text(kind):
            return truth_of(self.number(column))
        return f"CASE {self.flag_of_word(f'lower({self._trimmed(name)})', column)}"

    def text(self, column: str) -> str:
        name, kind = self._columns[column]
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            # A separator that stands in no tag: the blanks of all tags of a row are replaced at once.
            name = f"replace(replace(array_to_string({name}, chr(31)), ' ', '_'), chr(31), ' ')"
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            name = f"CASE WHEN octet_length({name}) > 0 THEN decode({name}) END"
        elif not is_text(kind):
            name = f"CAST({name} AS VARCHAR)"
        return f"coalesce({name}, '')"

    def date(self, column: str) -> str:
        name, kind = self._columns[column]
        is_count = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if is_count:
            name = f"TRY(to_timestamp({seconds_of(f'CAST({name} AS DOUBLE)')}))"
        if is_count or (pa.types.is_timestamp(kind) and kind.tz):
            # A moment, in the site's zone, which is the connection's.
            local = f"strftime({name}, '{LOCAL_TIME}%z')"
            return f"coalesce(CASE WHEN length({local}) = 26 THEN {local} || ':00' ELSE {local} END, '')"
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            return f"coalesce(strftime({name}, '{LOCAL_TIME}'), '')"
        return self.clock_date(self.text(column))

    def day(self, date: str) -> str:
        start = f"substr({date}, 1, 10)"
        return f"CASE WHEN CAST(TRY_CAST({start} AS DATE) AS VARCHAR) = {start} THEN {start} END"

    @staticmethod
    def _trimmed(name: str) -> str:
        return f"trim({name}, ' ' || chr(9) || chr(10) || chr(13))"


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_leaf(kind: pa.DataType) -> bool:
    """Whether a column of this type holds one value, or one list of texts, a row."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = kind.value_type
        return is_text(inner.value_type if pa.types.is_dictionary(inner) else inner)
    return not pa.types.is_nested(kind)
