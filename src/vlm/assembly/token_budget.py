"""Searches for options of an image or video processor with which no image takes more tokens than a budget allows.

No class is known here by name. The search tries which options limit the tokens of large images: it lowers each whole
number that is an upper limit (`max_patches`, `size.longest_edge` …), each list of grids and each switch that splits
images, and lets the processor count the tokens of blank images. An option that lowers the count is then set to the
highest value within the budget. Sizes on which the result fails are added to those that are tried, until there are
none.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import cast

from vlm.models.pixels import Settings

Size = tuple[int, int]
"""Height and width in pixels."""
Path = tuple[str, ...]
"""The place of an option among settings."""
Measure = Callable[[Settings, Size], int | None]
"""Returns the tokens of a blank image under some settings; None if they, or the size, are refused."""

SPLITTING = ("do_image_splitting", "split_image", "crop_to_patches", "slice_mode", "do_pan_and_scan", "use_thumbnail")
"""Switches that make an image a single view, or fewer views."""
OTHER_LIMITS = ("longest_edge", "dynamic_hd", "image_area", "rescale_image_max_upscaled_long_edge")
"""Upper limits without `max` in their names."""
PLACES = ((), ("size",))
"""Where limits are; `max_image_size.longest_edge` is the side of the visual encoder's input, and no limit."""
MAX_ASPECT = 20
"""The largest aspect ratio of images that the search keeps within the budget. For longer images, some processors need
more tokens than for any other; to fit those, all others would have to be much smaller."""
LARGE, SIDES = 10_000, (10_000, 900)
"""Longer sides of the images that are tried."""
RATIOS = (1.0, 1.33, 1.5, 2.0, 3.0, 4.0, 6.0, 12.0, MAX_ASPECT)
NUM_RATIOS = 36
"""Ratios of sides, evenly spread, that the result is tried on."""
PRECISION = 256
"""The relative precision with which a limit is found."""


class BudgetError(ValueError):
    """No option brings the tokens down to the budget; `least` is the number that can be reached."""

    def __init__(self, least: int):
        super().__init__(f"{least} tokens at least")
        self.least = least


@dataclass(frozen=True)
class Candidate:
    """An option that may bound tokens, and the values that it can be lowered to, ascending."""

    path: Path
    values: Sequence[object]
    first_guess: int | None = None


@dataclass
class BudgetSearch:
    """A search for settings, see the top of this file.

    Attributes:
        settings: those of the processor as it is.
        measure: counts the tokens of a size under settings.
        budget: the most tokens of an image.
        largest_side: the longest side that is tried, for processors that need real pixels to count.
    """

    settings: Settings
    measure: Measure
    budget: int
    largest_side: int = LARGE
    sizes: list[Size] = field(default_factory=list)

    def run(self) -> Settings:
        """Return settings with which no size that is tried takes more than the budget.

        Raises:
            BudgetError: there are none.
        """
        self.sizes = [size for size in self._few_sizes() if self.measure(self.settings, size) is not None]
        while True:
            found = self._lower(self.settings)
            exceeding = [size for size in self._many_sizes() if (self.measure(found, size) or 0) > self.budget]
            if not exceeding:
                return found
            self.sizes = [*exceeding, *self.sizes]

    def most(self, settings: Settings) -> int | None:
        """Return the most tokens that a size takes; None if the processor does not take the settings."""
        counts = [self.measure(settings, size) for size in self.sizes]
        return None if None in counts else max(cast(list[int], counts), default=0)

    def fits(self, settings: Settings) -> bool:
        """Return whether no size takes more than the budget; sizes that do are tried first from then on."""
        for place, size in enumerate(self.sizes):
            number = self.measure(settings, size)
            if number is None or number > self.budget:
                self.sizes.insert(0, self.sizes.pop(place))
                return False
        return True

    def _lower(self, settings: Settings) -> Settings:
        """Return settings within the budget on all of `sizes`.

        First, one limit or list of grids is lowered. If that is not enough, images are not split either; then several
        limits are lowered.
        """
        if self.fits(settings):
            return settings
        floors = {path: value for path, value in _whole_numbers(settings) if _is_lower_limit(path, settings)}
        lowered = self._put_all(settings, floors, 1)
        if (found := self._lower_one(lowered)) is not None:
            return self._restore(found, floors)
        switches = {(name,): True for name in SPLITTING if settings.get(name) is True}
        lowered = self._put_all(lowered, switches, False)
        while (found := lowered if self.fits(lowered) else self._lower_one(lowered)) is None:
            leasts = [(self.most(trial), trial) for trial in map(self._least_of(lowered), self._candidates(lowered))]
            known = [(number, trial) for number, trial in leasts if number is not None]
            now = self.most(lowered) or 0
            least, best = min(known, key=lambda pair: pair[0], default=(now, lowered))
            if least >= now:
                raise BudgetError(now)
            lowered = best
        for path in switches:
            trial = _put(found, path, True)
            found = trial if self.fits(trial) else found
        return self._restore(found, floors)

    def _put_all(self, settings: Settings, paths: Iterable[Path], value: object) -> Settings:
        """Return settings with a value at each of several places, except where the processor does not accept it."""
        for path in paths:
            trial = _put(settings, path, value)
            settings = trial if self.most(trial) is not None else settings
        return settings

    def _lower_one(self, settings: Settings) -> Settings | None:
        """Return settings that fit by changing one option; of several, the one that leaves images the most tokens."""
        fitting = [option for option in self._candidates(settings) if self.fits(self._least_of(settings)(option))]
        found = [_put(settings, option.path, self._highest(settings, option)) for option in fitting]
        return max(found, key=self._sum, default=None) if len(found) > 1 else next(iter(found), None)

    def _sum(self, settings: Settings) -> int:
        return sum(self.measure(settings, size) or 0 for size in self.sizes)

    def _least_of(self, settings: Settings) -> Callable[[Candidate], Settings]:
        return lambda option: _put(settings, option.path, option.values[0])

    def _highest(self, settings: Settings, option: Candidate) -> object:
        """Return the highest value of an option that fits; its first one does."""
        low, high, guess = 0, len(option.values), option.first_guess
        if guess is not None:
            high = min(high, guess)
            if self.fits(_put(settings, option.path, option.values[high - 1])):
                return option.values[high - 1]
        while high - low > max(1, low // PRECISION):
            middle = (low + high) // 2
            if self.fits(_put(settings, option.path, option.values[middle])):
                low = middle
            else:
                high = middle
        return option.values[low]

    def _restore(self, settings: Settings, floors: dict[Path, int]) -> Settings:
        """Raise lowered limits back towards their original values."""
        for path, value in floors.items():
            if _get(settings, path) == value:
                continue
            original = _put(settings, path, value)
            highest = value if self.fits(original) else self._highest(settings, Candidate(path, range(1, value)))
            settings = _put(settings, path, highest)
        return settings

    def _candidates(self, settings: Settings) -> Iterator[Candidate]:
        """Yield the options that may bound tokens: limits and lists of grids."""
        for path, value in [leaf for leaf in _whole_numbers(settings) if _is_upper_limit(leaf[0])]:
            values: Sequence[int] = range(1, value + 1)
            if self.most(_put(settings, path, 1)) is None:  # such as Gemma 4, which takes a few numbers only
                halves = sorted({value >> shift for shift in range(value.bit_length())})
                values = [number for number in halves if self.most(_put(settings, path, number)) is not None]
            if values:
                yield Candidate(path, values, self._guess(path, settings))
        for name, value in settings.items():
            if _is_grid_list(value):
                yield Candidate((name,), _shortened_lists(value))

    def _guess(self, path: Path, settings: Settings) -> int | None:
        """Return the area of as many tokens as the budget has, where an option is an area and tokens are squares."""
        patch, merge = settings.get("patch_size"), settings.get("merge_size")
        if isinstance(patch, int) and isinstance(merge, int) and path[-1] in ("max_pixels", "longest_edge"):
            return self.budget * (patch * merge) ** 2
        return None

    def _few_sizes(self) -> Iterator[Size]:
        """Yield sizes of each kind: large and small ones of many shapes, and those that settings name."""
        yield from _shapes(RATIOS, (self.largest_side,))
        yield from _shapes((1.0, 2.0, 9.0), (300,))
        yield from [(2, 2), (28, 28), (2, 40), (40, 2)]
        for value in self.settings.values():
            if _is_grid_list(value):
                yield from (tuple(pair) for pair in value)

    def _many_sizes(self) -> Iterator[Size]:
        """Yield sizes of many shapes."""
        ratios = [MAX_ASPECT ** (step / NUM_RATIOS) for step in range(NUM_RATIOS + 1)]
        return _shapes(ratios, sorted({min(side, self.largest_side) for side in SIDES}))


def changed_options(before: Settings, after: Settings) -> dict[str, tuple[object, object]]:
    """Return the options in which settings differ: `size.longest_edge` -> its old and new value."""
    former = dict(_leaves(before))
    return {".".join(path): (former.get(path), value) for path, value in _leaves(after) if former.get(path) != value}


def _shapes(ratios: Sequence[float], sides: Sequence[int]) -> Iterator[Size]:
    for side in sides:
        for ratio in ratios:
            short = max(round(side / ratio), 2)
            short += short in (3, 4)  # which would be taken for channels
            yield from dict.fromkeys([(side, short), (short, side)])


def _leaves(settings: Settings) -> Iterator[tuple[Path, object]]:
    """Yield the options that may be limits: those of the top, and the entries of `size`."""
    for place in PLACES:
        mapping = _get(settings, place)
        if isinstance(mapping, dict):
            yield from (((*place, name), value) for name, value in mapping.items() if not isinstance(value, dict))


def _whole_numbers(settings: Settings) -> Iterator[tuple[Path, int]]:
    """Yield the options that are whole numbers above 1, which can be lowered."""
    for path, value in _leaves(settings):
        if isinstance(value, int) and type(value) is int and value > 1:
            yield path, value


def _is_upper_limit(path: Path) -> bool:
    return "max" in path[-1].split("_") or path[-1] in OTHER_LIMITS


def _is_lower_limit(path: Path, settings: Settings) -> bool:
    of_range = path[-1] == "shortest_edge" and _get(settings, (*path[:-1], "longest_edge")) is not None
    return "min" in path[-1].split("_") or of_range


def _is_grid_list(value: object) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    pairs = [pair for pair in value if isinstance(pair, list | tuple) and len(pair) == 2]
    return len(pairs) == len(value) and all(type(number) is int for pair in pairs for number in pair)


def _shortened_lists(grids: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Return ascending lists of grids, in their order: the smallest square, the smallest grid, the two smallest …"""
    pairs = [list(pair) for pair in grids]
    smallest = min(number for pair in pairs for number in pair)
    by_area = sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[0]))
    squares = [] if [smallest, smallest] in pairs else [[[smallest, smallest]]]
    return squares + [[pair for pair in pairs if pair in by_area[:number]] for number in range(1, len(pairs) + 1)]


def _get(settings: Settings, path: Path) -> object:
    node: object = settings
    for name in path:
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _put(settings: Settings, path: Path, value: object) -> Settings:
    """Return a copy of settings with another value at a place."""
    copied = {**settings, path[0]: deepcopy(settings[path[0]])}
    node = copied
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    return copied
