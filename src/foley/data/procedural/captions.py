"""What a listener might write under a clip of each class: phrases, and captions drawn from them.

Every template stands alone and reads well with every slot left empty; that form is the canonical caption. Slots in
braces take adjectives that hold for the clip.
"""

import re
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

TEMPLATES: dict[str, tuple[str, ...]] = {
    "pure tone": (
        "a {pitch} pure tone",
        "a {pitch} sine wave plays",
        "a {pitch} steady tone sounds",
        "a {pitch} electronic test tone",
        "a {pitch} continuous beep tone",
        "a single {pitch} sine tone hums without change",
        "an oscillator plays a {pitch} constant note",
        "a plain {pitch} tone holds steadily",
    ),
    "chord": (
        "a {pitch} chord",
        "an organ holds a {pitch} chord",
        "a sustained {pitch} musical chord",
        "a synthesizer plays a {pitch} chord",
        "three {pitch} notes sound together in harmony",
        "a {pitch} organ chord rings out",
        "a {pitch} keyboard chord is held",
        "{pitch} harmonious organ notes play",
    ),
    "rising sweep": (
        "a {rate} rising sweep",
        "a tone sweeps upwards in {rate} rises",
        "a {rate} upward sweep of pitch",
        "a sine tone glides from low to high",
        "an electronic tone rises in pitch",
        "a {rate} ascending glide",
        "the pitch of a synthesizer goes up again and again",
        "a {rate} rising electronic whoop",
    ),
    "falling sweep": (
        "a {rate} falling sweep",
        "a tone sweeps downwards in {rate} falls",
        "a {rate} downward sweep of pitch",
        "a sine tone glides from high to low",
        "an electronic tone falls in pitch",
        "a {rate} descending glide",
        "the pitch of a synthesizer goes down again and again",
        "a {rate} dropping electronic whistle of a bomb",
    ),
    "siren": (
        "a {rate} siren wails",
        "a police siren wails up and down",
        "an emergency vehicle passes with its {rate} siren on",
        "an ambulance siren sounds",
        "a {rate} wailing siren",
        "a fire truck blares its siren",
        "a {rate} emergency siren goes up and down",
        "the siren of a police car howls",
    ),
    "alarm": (
        "an alarm goes off with {rate} beeps",
        "{rate} {pitch} alarm beeps",
        "a {pitch} alarm clock beeps",
        "an electronic device beeps repeatedly",
        "a {rate} {pitch} beeping alarm",
        "a smoke detector gives {rate} beeps",
        "{pitch} electronic beeping",
        "a timer beeps with {rate} {pitch} beeps",
    ),
    "telephone": (
        "a telephone rings",
        "a {pitch} telephone ring",
        "an old phone is ringing",
        "a {pitch} phone trills in bursts",
        "a landline telephone rings again and again",
        "an office phone gives a {pitch} ring",
        "a {pitch} ringing telephone",
        "the phone rings and nobody answers",
    ),
    "whistle": (
        "a person whistles a {pitch} note",
        "a {pitch} whistle with vibrato",
        "someone whistling a {pitch} wavering note",
        "a {pitch} human whistle",
        "a man whistles with a strong vibrato",
        "a {pitch} trembling whistle",
        "whistling",
        "a {pitch} flute-like whistle wavers",
    ),
    "hum": (
        "an electric hum",
        "a {pitch} electrical buzz",
        "a transformer buzzes with a {pitch} hum",
        "mains hum from a {pitch} buzzing power line",
        "an electric appliance hums steadily",
        "a {pitch} steady buzzing",
        "a {pitch} humming of electricity",
        "a fluorescent lamp buzzes",
    ),
    "laser": (
        "{rate} laser zaps",
        "a laser gun fires {rate} shots",
        "a ray gun zaps",
        "science fiction blasters shoot with {rate} zaps",
        "{rate} pew pew laser shots",
        "a video game laser fires",
        "a space ship shoots {rate} lasers",
        "an electronic zapping sound repeats",
    ),
    "bell": (
        "a {pitch} bell rings",
        "church bells ring",
        "a {pitch} bell tolls with {rate} strikes",
        "a large {pitch} bell is struck",
        "a {pitch} metallic bell chimes",
        "the {rate} ringing of a {pitch} bell",
        "a {pitch} bell dings and rings on",
        "a clock tower bell tolls",
    ),
    "white noise": (
        "white noise",
        "steady white noise hisses",
        "the static of an untuned television",
        "radio static",
        "a bright hissing noise without change",
        "constant static hiss",
        "a white noise machine runs",
        "flat broadband hiss",
    ),
    "pink noise": (
        "pink noise",
        "steady pink noise",
        "a soft balanced hiss of pink noise",
        "a pink noise generator runs",
        "warm even noise plays",
        "pink noise for sleeping",
        "constant mellow noise",
        "a smooth pink noise hiss",
    ),
    "brown noise": (
        "brown noise",
        "steady brown noise",
        "a deep dull noise of brown noise",
        "a brown noise generator runs",
        "a low constant roar of noise",
        "brown noise rumbles evenly",
        "a muffled steady low noise",
        "dark brown noise for relaxing",
    ),
    "rain": (
        "{density} rain falls",
        "{density} rain patters on a roof",
        "rain drops fall on a surface in a {density} shower",
        "a {density} rain shower",
        "it is raining",
        "{density} rainfall splatters on the ground",
        "a {density} rainstorm pours down",
        "the patter of {density} rain",
    ),
    "wind": (
        "wind blows",
        "a {pitch} wind howls",
        "wind whistles with a {pitch} moan",
        "gusts of {pitch} howling wind",
        "strong wind is blowing",
        "the {pitch} moaning of the wind",
        "a windy day outdoors",
        "wind gusts around a house",
    ),
    "ocean": (
        "ocean waves crash",
        "{rate} waves roll onto a beach",
        "the sea washes on the shore with {rate} waves",
        "{rate} ocean surf",
        "waves break on the beach",
        "{rate} sea waves come and go",
        "the tide splashes against the shore",
        "the rushing of {rate} ocean waves",
    ),
    "thunder": (
        "thunder rumbles",
        "thunder rolls in the sky",
        "a thunderstorm rumbles deeply",
        "thunder claps and rumbles",
        "rolling thunder",
        "the rumble of thunder in a storm",
        "a thunder strike echoes",
        "thunder growls in the clouds",
    ),
    "explosion": (
        "an explosion",
        "a bomb explodes",
        "an explosion booms",
        "something blows up with a blast",
        "a huge blast with a deep boom",
        "a bomb detonates",
        "a cannon fires with a boom",
        "a large explosion roars and dies away",
    ),
    "fire": (
        "a {density} fire crackles",
        "a campfire is crackling",
        "wood burns and pops in a {density} fire",
        "{density} crackling of flames",
        "a fireplace crackles",
        "flames pop and crackle",
        "a {density} bonfire burns",
        "logs crackle in the fire",
    ),
    "engine": (
        "an engine idles",
        "a {rate} engine runs",
        "a motor rumbles with {rate} strokes",
        "a truck engine idles",
        "a {rate} running diesel engine",
        "a tractor engine chugs",
        "the rumbling of a {rate} motor",
        "a car engine is running",
    ),
    "helicopter": (
        "a helicopter flies",
        "a helicopter hovers with {rate} rotor blades",
        "the {rate} chopping of helicopter blades",
        "a chopper passes overhead",
        "{rate} helicopter rotors spin",
        "an aircraft with {rate} rotors flies by",
        "a helicopter whirs in the air",
        "a {rate} rotor thumps the air",
    ),
    "metronome": (
        "a {rate} metronome",
        "a metronome clicks at a {rate} beat",
        "{rate} wooden clicks",
        "a {rate} steady clicking",
        "a wood block is tapped at a {rate} tempo",
        "a metronome keeps time",
        "{rate} regular knocks on a wood block",
        "{rate} click track",
    ),
    "clock": (
        "a clock ticks",
        "a {rate} ticking clock",
        "tick tock of a {rate} clock",
        "a wall clock is ticking",
        "the {rate} ticking of a wristwatch",
        "a small clock makes {rate} ticks",
        "a pocket watch ticks",
        "a mechanical clock goes tick tock",
    ),
    "heartbeat": (
        "a heart beats",
        "a {rate} heartbeat",
        "the {rate} thumping of a heart",
        "a muffled {rate} heartbeat through a stethoscope",
        "a heart is beating",
        "a {rate} pulse thumps",
        "the sound of a {rate} beating heart",
        "lub dub of a {rate} heart",
    ),
    "drum": (
        "a {rate} drum beat",
        "drums play a {rate} rhythm",
        "a drummer plays kick and snare",
        "a {rate} beat on a drum kit",
        "a drum machine plays a {rate} beat",
        "drumming at a {rate} tempo",
        "someone plays the drums",
        "a {rate} drum loop",
    ),
    "footsteps": (
        "{rate} footsteps",
        "someone walks on gravel with {rate} steps",
        "footsteps crunch on gravel",
        "a person walks with {rate} steps",
        "{rate} steps on dry leaves",
        "shoes crunch at a {rate} pace",
        "a person is walking",
        "{rate} crunching footsteps in the snow",
    ),
    "water drops": (
        "water drips",
        "{rate} water drops",
        "a tap drips into a sink with {rate} drops",
        "water droplets fall into a pool",
        "{rate} dripping water in a cave",
        "drops of water plop",
        "a leaking faucet makes {rate} drips",
        "the {rate} dripping of water",
    ),
    "crickets": (
        "crickets chirp",
        "crickets chirp at night",
        "a {pitch} cricket gives {rate} chirps",
        "insects chirp in the grass",
        "{rate} chirping of {pitch} crickets",
        "night insects sing",
        "a summer night with {rate} crickets",
        "the {pitch} stridulation of a cricket",
    ),
    "birds": (
        "birds chirp",
        "a bird sings {pitch} {rate} notes",
        "birds are singing",
        "{rate} {pitch} birdsong",
        "a {pitch} bird tweets",
        "small birds twitter in a tree",
        "{rate} chirping of birds",
        "a songbird sings with {rate} chirps",
    ),
    "dog bark": (
        "a dog barks",
        "a {pitch} dog bark repeats",
        "a dog gives {rate} {pitch} barks",
        "the {rate} barking of a dog",
        "a dog is barking",
        "{pitch} dog barks",
        "a puppy or hound barks with {pitch} barks",
        "{rate} woofs of a dog",
    ),
    "glass": (
        "glass breaks",
        "a glass shatters",
        "a window smashes into shards",
        "glass is smashed",
        "a bottle breaks and shards tinkle",
        "shattering of glass",
        "someone drops a glass and it breaks",
        "the crash of breaking glass",
    ),
}


_LEVELS = (("faintly", "quietly", "in the distance"), (), ("loudly", "close by"))
SEQUENCE = ("{first}, then {second}", "{first} followed by {second}", "first {first}, and after that {second}")
MIXTURE = ("{first} while {second}", "{first} and {second}", "{first} with {second} at the same time")


def _tidy(text: str) -> str:
    """Close the gaps of empty slots and set "a" or "an" by the letter that follows."""
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"\ban? (?=(\w))", lambda m: "an " if m.group(1) in "aeiou" else "a ", text)


def caption(class_name: str, slots: Mapping[str, tuple[str, ...]], level: float, rng: np.random.Generator) -> str:
    """A random caption that is true of a clip of `class_name`.

    Args:
        slots: adjectives that hold per slot; empty where the parameter is unremarkable.
        level: position of the clip's loudness in its range, in [0, 1].
    """
    words = {name: str(rng.choice(choices)) if choices else "" for name, choices in slots.items()}
    text = str(rng.choice(TEMPLATES[class_name])).format(**words)
    adverbs = _LEVELS[min(int(3 * level), 2)]
    return _tidy(f"{text} {rng.choice(adverbs)}" if adverbs and rng.random() < 0.5 else text)


def combine(captions: tuple[str, str], forms: tuple[str, ...], rng: np.random.Generator) -> str:
    """One caption for two sounds, in one of `forms` (`SEQUENCE` or `MIXTURE`)."""
    return str(rng.choice(forms)).format(first=captions[0], second=captions[1])


@lru_cache
def captions_for(class_name: str) -> list[str]:
    """The canonical captions of a class, all without adjectives; raises KeyError for an unknown class."""
    if class_name not in TEMPLATES:
        raise KeyError(f"unknown sound class {class_name!r}; one of {sorted(TEMPLATES)}")
    empty = {"pitch": "", "rate": "", "density": ""}
    return [_tidy(template.format(**empty)) for template in TEMPLATES[class_name]]
