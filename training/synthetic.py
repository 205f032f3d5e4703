"""Short Python functions whose body follows from their name, parameters and docstring.

Every function is drawn from a family of ways to write one small thing: sum an attribute, group by a key, read a file,
clamp a number. The names come from lists that are combined freely, and a share of them is made up, so that the body can
only be right by copying names from the signature. `function(rng)` gives one; the same rng state gives the same text.
"""

NOUNS = """
order item user account product customer invoice message event ticket task job worker node edge point shape circle
square book author student teacher course lesson grade score player team game match card deck hand piece board move
file folder path line word letter token symbol page chapter section record row column table cell entry key value pair
list record sensor reading sample signal frame packet request response session connection client server host port route
city country region street house room door window car truck bus train plane ship flight trip stop station ticket seat
animal dog cat bird fish horse tree plant flower leaf fruit apple orange recipe step ingredient meal dish plate cup
color image pixel layer scene camera video clip song album artist track playlist note chord movie actor review comment
post thread reply topic tag label category group member role rule policy limit quota plan budget expense payment
transaction transfer bank loan asset stock share trade market price quote bid contract vendor supplier shipment parcel
box bin shelf store shop cart coupon discount offer sale lead contact company office employee manager department
project issue bug patch commit branch build release version package module function method test case suite error
warning log metric counter gauge alert rule check report chart document form field option setting feature flag device
phone robot motor battery wheel engine machine part tool order cluster replica shard block chunk segment span region
vector matrix cube sphere line curve particle atom molecule cell gene protein patient doctor visit drug dose symptom
question answer quiz exam attempt badge level quest monster weapon hero spell planet star galaxy moon rocket probe
""".split()
HELD_OUT_NOUNS = """
walrus kettle lantern saddle violin tractor pebble harbor pillow ladder quilt basket cactus falcon glacier hammock
igloo jacket kayak llama magnet napkin otter parrot raccoon scooter teapot umbrella vulture waffle yacht zebra
""".split()
NUMERIC = """
price amount total weight height width length depth size age count score rating rank level speed duration distance
cost balance salary volume area priority quantity capacity latency temperature pressure power energy points votes
views likes stock discount tax fee bonus mass radius offset delay timeout budget progress usage load
""".split()
HELD_OUT_FIELDS = "torque humidity altitude calories mileage voltage tariff stamina".split()
TEXTUAL = """
name title label email city country color kind status category author owner language currency address phone code
brand model genre host domain region team department department role username state symbol topic format source
""".split()
BOOLEAN = """
active enabled visible valid open closed ready done paid public private locked empty available verified expired
approved archived deleted online selected completed published hidden shipped
""".split()
VERBS = "process handle send print show save update validate start stop close open run publish render load".split()
UNITS = [  # name, docstring, expression; {x} is the parameter
    ("celsius_to_fahrenheit", "celsius", "Convert degrees Celsius to Fahrenheit.", "{x} * 9 / 5 + 32"),
    ("fahrenheit_to_celsius", "fahrenheit", "Convert degrees Fahrenheit to Celsius.", "({x} - 32) * 5 / 9"),
    ("km_to_miles", "km", "Convert kilometers to miles.", "{x} * 0.621371"),
    ("miles_to_km", "miles", "Convert miles to kilometers.", "{x} * 1.60934"),
    ("minutes_to_seconds", "minutes", "Convert minutes to seconds.", "{x} * 60"),
    ("hours_to_minutes", "hours", "Convert hours to minutes.", "{x} * 60"),
    ("hours_to_seconds", "hours", "Convert hours to seconds.", "{x} * 3600"),
    ("days_to_hours", "days", "Convert days to hours.", "{x} * 24"),
    ("kilobytes_to_bytes", "kilobytes", "Convert kilobytes to bytes.", "{x} * 1024"),
    ("degrees_to_radians", "degrees", "Convert degrees to radians.", "{x} * math.pi / 180"),
    ("radians_to_degrees", "radians", "Convert radians to degrees.", "{x} * 180 / math.pi"),
    ("percent_to_fraction", "percent", "Convert a percentage to a fraction.", "{x} / 100"),
    ("meters_to_feet", "meters", "Convert meters to feet.", "{x} * 3.28084"),
    ("grams_to_kilograms", "grams", "Convert grams to kilograms.", "{x} / 1000"),
]
GEOMETRY = [
    ("rectangle_area", "width, height", "Return the area of a rectangle.", "width * height"),
    ("rectangle_perimeter", "width, height", "Return the perimeter of a rectangle.", "2 * (width + height)"),
    ("square_area", "side", "Return the area of a square.", "side * side"),
    ("square_area", "side", "Return the area of a square.", "side ** 2"),
    ("circle_area", "radius", "Return the area of a circle.", "math.pi * radius ** 2"),
    ("circle_circumference", "radius", "Return the circumference of a circle.", "2 * math.pi * radius"),
    ("triangle_area", "base, height", "Return the area of a triangle.", "base * height / 2"),
    ("box_volume", "width, height, depth", "Return the volume of a box.", "width * height * depth"),
    ("sphere_volume", "radius", "Return the volume of a sphere.", "4 / 3 * math.pi * radius ** 3"),
    ("hypotenuse", "a, b", "Return the length of the hypotenuse.", "math.sqrt(a ** 2 + b ** 2)"),
    ("distance", "x1, y1, x2, y2", "Return the distance between two points.",
     "math.sqrt((x2 - x1) ** 2 + (y2 - y1) ** 2)"),
    ("average", "a, b", "Return the average of two numbers.", "(a + b) / 2"),
    ("add", "a, b", "Return the sum of a and b.", "a + b"),
    ("subtract", "a, b", "Return the difference of a and b.", "a - b"),
    ("multiply", "a, b", "Return the product of a and b.", "a * b"),
    ("divide", "a, b", "Return the quotient of a and b.", "a / b"),
    ("power", "base, exponent", "Return base raised to exponent.", "base ** exponent"),
    ("is_even", "n", "Return True if n is even.", "n % 2 == 0"),
    ("is_odd", "n", "Return True if n is odd.", "n % 2 == 1"),
    ("is_positive", "n", "Return True if n is positive.", "n > 0"),
    ("is_negative", "n", "Return True if n is negative.", "n < 0"),
    ("is_divisible", "n, divisor", "Return True if n is divisible by divisor.", "n % divisor == 0"),
    ("is_leap_year", "year", "Return True if year is a leap year.",
     "year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)"),
    ("is_palindrome", "text", "Return True if text is a palindrome.", "text == text[::-1]"),
    ("is_between", "value, low, high", "Return True if value is between low and high.", "low <= value <= high"),
    ("clamp", "value, low, high", "Clamp value between low and high.", "max(low, min(value, high))"),
    ("sign", "n", "Return the sign of n.", "(n > 0) - (n < 0)"),
    ("square", "n", "Return the square of n.", "n * n"),
    ("cube", "n", "Return the cube of n.", "n ** 3"),
    ("absolute", "n", "Return the absolute value of n.", "n if n >= 0 else -n"),
    ("maximum", "a, b", "Return the larger of a and b.", "a if a > b else b"),
    ("minimum", "a, b", "Return the smaller of a and b.", "a if a < b else b"),
    ("reverse_text", "text", "Return text in reverse.", "text[::-1]"),
    ("count_words", "text", "Return the number of words in text.", "len(text.split())"),
    ("count_lines", "text", "Return the number of lines in text.", "len(text.splitlines())"),
    ("count_vowels", "text", "Return the number of vowels in text.",
     'sum(1 for char in text if char in "aeiou")'),
    ("first_word", "text", "Return the first word of text.", "text.split()[0]"),
    ("last_word", "text", "Return the last word of text.", "text.split()[-1]"),
    ("initials", "name", "Return the initials of name.", '"".join(part[0] for part in name.split())'),
    ("capitalize_words", "text", "Capitalize every word in text.",
     '" ".join(word.capitalize() for word in text.split())'),
    ("remove_spaces", "text", "Remove all spaces from text.", 'text.replace(" ", "")'),
    ("remove_vowels", "text", "Remove all vowels from text.",
     '"".join(char for char in text if char not in "aeiou")'),
    ("slugify", "text", "Return text as a slug.", 'text.strip().lower().replace(" ", "-")'),
    ("is_blank", "text", "Return True if text is blank.", "not text.strip()"),
    ("to_upper", "text", "Return text in upper case.", "text.upper()"),
    ("to_lower", "text", "Return text in lower case.", "text.lower()"),
    ("longest_word", "text", "Return the longest word in text.", "max(text.split(), key=len)"),
    ("truncate", "text, length", "Truncate text to length characters.", "text[:length]"),
    ("repeat", "text, count", "Repeat text count times.", "text * count"),
    ("starts_with", "text, prefix", "Return True if text starts with prefix.", "text.startswith(prefix)"),
    ("ends_with", "text, suffix", "Return True if text ends with suffix.", "text.endswith(suffix)"),
    ("contains", "items, value", "Return True if items contains value.", "value in items"),
    ("first", "items", "Return the first of items.", "items[0]"),
    ("last", "items", "Return the last of items.", "items[-1]"),
    ("rest", "items", "Return all items but the first.", "items[1:]"),
    ("reverse", "items", "Return items in reverse order.", "items[::-1]"),
    ("unique", "items", "Return the unique items.", "list(set(items))"),
    ("is_empty", "items", "Return True if items is empty.", "len(items) == 0"),
    ("mean", "values", "Return the mean of values.", "sum(values) / len(values)"),
    ("span", "values", "Return the difference between the largest and the smallest of values.",
     "max(values) - min(values)"),
    ("is_sorted", "values", "Return True if values are sorted.",
     "all(a <= b for a, b in zip(values, values[1:]))"),
    ("dot", "a, b", "Return the dot product of a and b.", "sum(x * y for x, y in zip(a, b))"),
    ("flatten", "lists", "Flatten a list of lists.", "[item for items in lists for item in items]"),
    ("transpose", "rows", "Transpose a list of rows.", "[list(row) for row in zip(*rows)]"),
    ("chunks", "items, size", "Split items into chunks of size.",
     "[items[i:i + size] for i in range(0, len(items), size)]"),
    ("squares", "n", "Return the squares of the numbers below n.", "[i * i for i in range(n)]"),
    ("evens", "numbers", "Return the even numbers.", "[n for n in numbers if n % 2 == 0]"),
    ("odds", "numbers", "Return the odd numbers.", "[n for n in numbers if n % 2 == 1]"),
    ("invert", "mapping", "Swap the keys and values of mapping.", "{value: key for key, value in mapping.items()}"),
    ("merge", "first, second", "Merge two dictionaries.", "{**first, **second}"),
    ("sorted_keys", "mapping", "Return the sorted keys of mapping.", "sorted(mapping.keys())"),
    ("common", "a, b", "Return the items that a and b have in common.", "[item for item in a if item in b]"),
    ("difference", "a, b", "Return the items of a that are not in b.", "[item for item in a if item not in b]"),
    ("digits", "n", "Return the digits of n.", "[int(digit) for digit in str(n)]"),
    ("sum_of_digits", "n", "Return the sum of the digits of n.", "sum(int(digit) for digit in str(n))"),
    ("last_digit", "n", "Return the last digit of n.", "n % 10"),
    ("factorial", "n", "Return the factorial of n.", "1 if n <= 1 else n * factorial(n - 1)"),
]
LOOPS = [
    ('def factorial(n):\n    """Return the factorial of n."""\n    result = 1\n    for i in range(2, n + 1):\n'
     '        result *= i\n    return result'),
    ('def fibonacci(n):\n    """Return the nth Fibonacci number."""\n    a, b = 0, 1\n    for _ in range(n):\n'
     '        a, b = b, a + b\n    return a'),
    ('def fibonacci(n):\n    """Return the nth Fibonacci number."""\n    if n < 2:\n        return n\n'
     '    return fibonacci(n - 1) + fibonacci(n - 2)'),
    ('def gcd(a, b):\n    """Return the greatest common divisor of a and b."""\n    while b:\n        a, b = b, a % b\n'
     '    return a'),
    ('def is_prime(n):\n    """Return True if n is prime."""\n    if n < 2:\n        return False\n'
     '    for i in range(2, int(n ** 0.5) + 1):\n        if n % i == 0:\n            return False\n    return True'),
    ('def product(values):\n    """Return the product of values."""\n    result = 1\n    for value in values:\n'
     '        result *= value\n    return result'),
    ('def running_total(values):\n    """Return the running total of values."""\n    total = 0\n    result = []\n'
     '    for value in values:\n        total += value\n        result.append(total)\n    return result'),
    ('def remove_duplicates(items):\n    """Remove duplicates from items, keeping their order."""\n    seen = set()\n'
     '    result = []\n    for item in items:\n        if item not in seen:\n            seen.add(item)\n'
     '            result.append(item)\n    return result'),
    ('def binary_search(items, target):\n    """Return the index of target in sorted items, or -1."""\n'
     '    low, high = 0, len(items) - 1\n    while low <= high:\n        middle = (low + high) // 2\n'
     '        if items[middle] == target:\n            return middle\n        if items[middle] < target:\n'
     '            low = middle + 1\n        else:\n            high = middle - 1\n    return -1'),
    ('def bubble_sort(items):\n    """Sort items in place with bubble sort."""\n    for i in range(len(items)):\n'
     '        for j in range(len(items) - i - 1):\n            if items[j] > items[j + 1]:\n'
     '                items[j], items[j + 1] = items[j + 1], items[j]\n    return items'),
    ('def median(values):\n    """Return the median of values."""\n    values = sorted(values)\n'
     '    middle = len(values) // 2\n    if len(values) % 2 == 1:\n        return values[middle]\n'
     '    return (values[middle - 1] + values[middle]) / 2'),
    ('def sum_of_squares(n):\n    """Return the sum of the squares up to n."""\n    total = 0\n'
     '    for i in range(1, n + 1):\n        total += i * i\n    return total'),
    ('def collatz(n):\n    """Return the Collatz sequence of n."""\n    result = [n]\n    while n != 1:\n'
     '        n = n // 2 if n % 2 == 0 else 3 * n + 1\n        result.append(n)\n    return result'),
    ('def index_of(items, target):\n    """Return the index of target in items, or -1."""\n'
     '    for index, item in enumerate(items):\n        if item == target:\n            return index\n    return -1'),
    ('def partition(items, predicate):\n    """Split items by predicate."""\n    yes, no = [], []\n'
     '    for item in items:\n        if predicate(item):\n            yes.append(item)\n        else:\n'
     '            no.append(item)\n    return yes, no'),
]


def plural(noun):
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def made_up(rng):
    """A word that no list has, so that it can only be copied."""
    syllables = ["ba", "ko", "ri", "ten", "mo", "lu", "sha", "pi", "dor", "vel", "zan", "gri", "fo", "nex", "tu", "qua",
                 "mil", "ber", "so", "ka", "wen", "ji", "tro", "lin", "ex", "ar", "un", "ob", "el", "is"]
    return "".join(rng.choice(syllables) for _ in range(rng.choice([2, 2, 3])))


class Names:
    """The vocabulary of one function."""

    def __init__(self, rng, held_out=False):
        pick = rng.random()
        self.rng = rng
        if held_out:
            self.noun = rng.choice(HELD_OUT_NOUNS)
        else:
            self.noun = made_up(rng) if pick < 0.15 else rng.choice(NOUNS)
        if pick > 0.85:
            self.noun = rng.choice(TEXTUAL + BOOLEAN + NUMERIC) + "_" + self.noun
        self.nouns = plural(self.noun)
        pick = rng.random()
        self.number = made_up(rng) if pick < 0.12 else rng.choice(NUMERIC)
        self.text = made_up(rng) if pick > 0.88 else rng.choice(TEXTUAL)
        if held_out and pick < 0.5:
            self.number = rng.choice(HELD_OUT_FIELDS)
        self.flag = rng.choice(BOOLEAN)
        self.field = rng.choice([self.number, self.text])
        # Mostly the noun's own name in a loop, sometimes a short one.
        self.one = self.noun if rng.random() < 0.8 else self.noun[0]
        if self.one in ("i", "_"):
            self.one = self.noun
        self.many = self.nouns if rng.random() < 0.85 else rng.choice(["items", "values", "records", "entries", "rows"])
        if self.many != self.nouns and rng.random() < 0.5:
            self.one = {"items": "item", "values": "value", "records": "record", "entries": "entry", "rows": "row"}[self.many]


def method(rng, names):
    """A method: constructors, properties, collections."""
    n = names
    fields = []
    for _ in range(rng.choice([1, 2, 2, 3, 3, 4])):
        field = rng.choice([rng.choice(NUMERIC), rng.choice(TEXTUAL), n.field, n.noun, n.nouns])
        if field not in fields:
            fields.append(field)
    private = "_" if rng.random() < 0.3 else ""
    field = fields[0]
    doc = lambda text: '    """%s"""\n' % text if rng.random() < 0.7 else ""
    kind = rng.randrange(14)
    if kind <= 3:
        sets = "".join("\n    self.%s%s = %s" % (private, f, f) for f in fields)
        if rng.random() < 0.3:
            sets += "\n    self.%s%s = %s" % (private, n.nouns if n.nouns not in fields else "cache",
                                             rng.choice(["[]", "{}", "None", "0", "False", "set()"]))
        return "def __init__(self, %s):%s%s" % (", ".join(fields), "\n" + doc("Create a %s." % n.noun)[:-1]
                                                if rng.random() < 0.3 else "", sets)
    if kind == 4:
        return 'def get_%s(self):\n%s    return self.%s%s' % (field, doc("Return the %s." % field), private, field)
    if kind == 5:
        return 'def set_%s(self, %s):\n%s    self.%s%s = %s' % (field, field, doc("Set the %s." % field), private, field, field)
    if kind == 6:
        many = n.nouns
        verb = rng.choice(["append", "append", "add"])
        return 'def add_%s(self, %s):\n%s    self.%s%s.%s(%s)' % (n.noun, n.noun, doc("Add a %s." % n.noun), private, many,
                                                                 verb, n.noun)
    if kind == 7:
        return 'def remove_%s(self, %s):\n%s    self.%s%s.remove(%s)' % (n.noun, n.noun, doc("Remove a %s." % n.noun), private,
                                                                        n.nouns, n.noun)
    if kind == 8:
        return 'def __len__(self):\n%s    return len(self.%s%s)' % (doc("Return the number of %s." % n.nouns), private, n.nouns)
    if kind == 9:
        return 'def __iter__(self):\n%s    return iter(self.%s%s)' % (doc("Iterate over the %s." % n.nouns), private, n.nouns)
    if kind == 10:
        return 'def __eq__(self, other):\n%s    return self.%s%s == other.%s%s' % (
            doc("Return True if both have the same %s." % field), private, field, private, field)
    if kind == 11:
        return 'def __repr__(self):\n%s    return f"%s({self.%s%s})"' % (
            doc("Return a readable form."), n.noun.title().replace("_", ""), private, field)
    if kind == 12:
        return 'def is_%s(self):\n%s    return self.%s%s' % (n.flag, doc("Return True if %s." % n.flag), private, n.flag)
    return 'def get_%s(self, %s_id):\n%s    return self.%s%s.get(%s_id)' % (
        n.noun, n.noun, doc("Return the %s with the given id." % n.noun), private, n.nouns, n.noun)


def over_collection(rng, names):
    """A function over a list of things: (name, docstring, expression, loop or None)."""
    n = names
    one, many, num, txt, flag, field, nouns, noun = n.one, n.many, n.number, n.text, n.flag, n.field, n.nouns, n.noun
    get = (lambda f: "%s.%s" % (one, f)) if rng.random() < 0.72 else (lambda f: '%s["%s"]' % (one, f))
    c = rng.choice
    bound = c(["minimum", "limit", "threshold", "low"])
    upper = c(["maximum", "limit", "threshold", "high"])
    kinds = [
        lambda: (c(["total_" + num, "sum_" + num, "total_%s_of_%s" % (num, nouns)]), many,
                 c(["Return the sum of %s over all %s." % (num, nouns), "Return the total %s of all %s." % (num, nouns),
                    "Sum the %s of the %s." % (num, nouns)]), "sum(%s for %s in %s)" % (get(num), one, many),
                 "total = 0\n    for %s in %s:\n        total += %s\n    return total" % (one, many, get(num))),
        lambda: (c(["average_" + num, "mean_" + num]), many,
                 c(["Return the average %s of the %s.", "Return the mean %s of all %s."]) % (num, nouns),
                 "sum(%s for %s in %s) / len(%s)" % (get(num), one, many, many),
                 "total = sum(%s for %s in %s)\n    return total / len(%s)" % (get(num), one, many, many)),
        lambda: (c(["max_" + num, "highest_" + num, "largest_" + num]), many,
                 "Return the largest %s of the %s." % (num, nouns), "max(%s for %s in %s)" % (get(num), one, many), None),
        lambda: (c(["min_" + num, "lowest_" + num, "smallest_" + num]), many,
                 "Return the smallest %s of the %s." % (num, nouns), "min(%s for %s in %s)" % (get(num), one, many), None),
        lambda: (c(["%s_with_highest_%s" % (noun, num), "best_%s" % noun, "largest_%s" % noun]), many,
                 "Return the %s with the highest %s." % (noun, num), "max(%s, key=lambda %s: %s)" % (many, one, get(num)),
                 None),
        lambda: (c(["%s_with_lowest_%s" % (noun, num), "smallest_%s" % noun]), many,
                 "Return the %s with the lowest %s." % (noun, num), "min(%s, key=lambda %s: %s)" % (many, one, get(num)), None),
        lambda: (c(["sort_%s_by_%s" % (nouns, field), "sort_by_" + field]), many,
                 c(["Sort the %s by %s.", "Return the %s sorted by %s."]) % (nouns, field),
                 "sorted(%s, key=lambda %s: %s)" % (many, one, get(field)), None),
        lambda: (c(["sort_%s_by_%s" % (nouns, field), "sort_by_" + field]), many,
                 "Sort the %s by %s in descending order." % (nouns, field),
                 "sorted(%s, key=lambda %s: %s, reverse=True)" % (many, one, get(field)), None),
        lambda: (c(["%s_%s" % (flag, nouns), "filter_%s" % flag, "get_%s_%s" % (flag, nouns)]), many,
                 c(["Return the %s that are %s.", "Return only the %s that are %s."]) % (nouns, flag),
                 "[%s for %s in %s if %s]" % (one, one, many, get(flag)),
                 "result = []\n    for %s in %s:\n        if %s:\n            result.append(%s)\n    return result" %
                 (one, many, get(flag), one)),
        lambda: (c(["count_%s" % flag, "count_%s_%s" % (flag, nouns)]), many,
                 c(["Count the %s that are %s.", "Return the number of %s that are %s."]) % (nouns, flag),
                 "sum(1 for %s in %s if %s)" % (one, many, get(flag)),
                 "count = 0\n    for %s in %s:\n        if %s:\n            count += 1\n    return count" % (one, many, get(flag))),
        lambda: ("all_%s" % flag, many, "Return True if all %s are %s." % (nouns, flag),
                 "all(%s for %s in %s)" % (get(flag), one, many), None),
        lambda: ("any_%s" % flag, many, "Return True if any %s is %s." % (noun, flag),
                 "any(%s for %s in %s)" % (get(flag), one, many), None),
        lambda: (c(["%s_above" % nouns, "filter_%s" % nouns, "%s_above_%s" % (nouns, bound)]), "%s, %s" % (many, bound),
                 "Return the %s whose %s is above the %s." % (nouns, num, bound),
                 "[%s for %s in %s if %s > %s]" % (one, one, many, get(num), bound),
                 "result = []\n    for %s in %s:\n        if %s > %s:\n            result.append(%s)\n    return result" %
                 (one, many, get(num), bound, one)),
        lambda: (c(["%s_below" % nouns, "filter_%s" % nouns, "%s_below_%s" % (nouns, upper)]), "%s, %s" % (many, upper),
                 "Return the %s whose %s is below the %s." % (nouns, num, upper),
                 "[%s for %s in %s if %s < %s]" % (one, one, many, get(num), upper), None),
        lambda: (c(["find_%s_by_%s" % (noun, txt), "find_%s" % noun]), "%s, %s" % (many, txt),
                 c(["Return the %s with the given %s, or None.", "Find the %s with the given %s."]) % (noun, txt), None,
                 "for %s in %s:\n        if %s == %s:\n            return %s\n    return None" % (one, many, get(txt), txt, one)),
        lambda: (c(["%s_by_%s" % (nouns, txt), "filter_by_%s" % txt]), "%s, %s" % (many, txt),
                 "Return the %s with the given %s." % (nouns, txt), "[%s for %s in %s if %s == %s]" % (one, one, many, get(txt), txt),
                 None),
        lambda: (c(["get_%s" % plural(txt), "%s_%s" % (noun, plural(txt)), "list_%s" % plural(txt)]), many,
                 c(["Return the %s of all %s.", "Return the %s of the %s.", "List the %s of all %s."]) % (plural(txt), nouns),
                 "[%s for %s in %s]" % (get(txt), one, many),
                 "result = []\n    for %s in %s:\n        result.append(%s)\n    return result" % (one, many, get(txt))),
        lambda: ("unique_%s" % plural(txt), many, "Return the set of %s of all %s." % (plural(txt), nouns),
                 "{%s for %s in %s}" % (get(txt), one, many), None),
        lambda: (c(["group_by_%s" % txt, "group_%s_by_%s" % (nouns, txt)]), many, "Group the %s by %s." % (nouns, txt), None,
                 "groups = {}\n    for %s in %s:\n        groups.setdefault(%s, []).append(%s)\n    return groups" %
                 (one, many, get(txt), one)),
        lambda: (c(["count_by_%s" % txt, "count_%s_by_%s" % (nouns, txt)]), many, "Count the %s by %s." % (nouns, txt), None,
                 "counts = {}\n    for %s in %s:\n        counts[%s] = counts.get(%s, 0) + 1\n    return counts" %
                 (one, many, get(txt), get(txt))),
        lambda: (c(["index_by_%s" % txt, "%s_by_%s" % (nouns, txt), "index_%s" % nouns]), many,
                 c(["Index the %s by %s.", "Return a dictionary of the %s by %s."]) % (nouns, txt),
                 "{%s: %s for %s in %s}" % (get(txt), one, one, many), None),
        lambda: ("%s_to_%s" % (txt, num), many, "Map the %s of each %s to its %s." % (txt, noun, num),
                 "{%s: %s for %s in %s}" % (get(txt), get(num), one, many), None),
        lambda: (c(["join_%s" % plural(txt), "%s_string" % txt]), many, "Join the %s of the %s with commas." % (plural(txt), nouns),
                 '", ".join(%s for %s in %s)' % (get(txt), one, many), None),
        lambda: ("print_%s" % nouns, many, "Print the %s of each %s." % (txt, noun), None,
                 "for %s in %s:\n        print(%s)" % (one, many, get(txt))),
        lambda: ("%s_%s" % (c(VERBS), nouns), many, "", None,
                 "for %s in %s:\n        %s.%s()" % (one, many, one, c(VERBS))),
        lambda: ("has_%s" % noun, "%s, %s" % (many, txt), "Return True if any %s has the given %s." % (noun, txt),
                 "any(%s == %s for %s in %s)" % (get(txt), txt, one, many), None),
        lambda: ("apply_discount", "%s, rate" % many, "Reduce the %s of each %s by rate." % (num, noun), None,
                 "for %s in %s:\n        %s -= %s * rate\n    return %s" % (one, many, get(num), get(num), many)),
        lambda: ("top_%s" % nouns, "%s, n" % many, "Return the n %s with the highest %s." % (nouns, num),
                 "sorted(%s, key=lambda %s: %s, reverse=True)[:n]" % (many, one, get(num)), None),
        lambda: ("count_%s" % nouns, many, "Return the number of %s." % nouns, "len(%s)" % many, None),
        lambda: ("first_%s" % noun, many, "Return the first %s, or None if there is none." % noun,
                 "%s[0] if %s else None" % (many, many), None),
        lambda: ("last_%s" % noun, many, "Return the last %s, or None if there is none." % noun,
                 "%s[-1] if %s else None" % (many, many), None),
        lambda: ("remove_%s" % noun, "%s, %s" % (many, noun), "Return the %s without the given %s." % (nouns, noun),
                 "[other for other in %s if other != %s]" % (many, noun), None),
    ]
    name, parameters, doc, expression, loop = kinds[rng.randrange(len(kinds))]()
    doc = '    """%s"""\n' % doc if doc and rng.random() < 0.85 else ""
    if expression is None or (loop and rng.random() < 0.4):
        body = loop
    elif rng.random() < 0.1:
        body = "result = %s\n    return result" % expression
    else:
        body = "return " + expression
    guard = ""
    if rng.random() < 0.08:
        guard = "if not %s:\n        return %s\n    " % (many, c(["None", "[]", "0"]))
    return "def %s(%s):\n%s    %s%s" % (name, parameters, doc, guard, body)


def over_values(rng, names):
    """A function over plain parameters, with names that must be copied."""
    n = names
    c = rng.choice
    a, b = n.number, c([w for w in NUMERIC if w != n.number])
    noun = n.noun
    kinds = [
        lambda: ("set_%s" % a, "%s, %s" % (noun, a), "Set the %s of the %s." % (a, noun), "%s.%s = %s" % (noun, a, a)),
        lambda: ("get_%s" % a, noun, "Return the %s of the %s." % (a, noun), "return %s.%s" % (noun, a)),
        lambda: ("%s_per_%s" % (a, b), "%s, %s" % (a, b), "Return the %s per %s." % (a, b), "return %s / %s" % (a, b)),
        lambda: ("total_%s" % a, "%s, %s" % (a, b), "Return the sum of %s and %s." % (a, b), "return %s + %s" % (a, b)),
        lambda: ("multiply_%s" % a, "%s, %s" % (a, b), "Return %s times %s." % (a, b), "return %s * %s" % (a, b)),
        lambda: ("check_%s" % a, a, "Raise ValueError if %s is negative." % a,
                 'if %s < 0:\n        raise ValueError("%s must not be negative")\n    return %s' % (a, a, a)),
        lambda: ("validate_%s" % n.text, n.text, "Raise ValueError if %s is empty." % n.text,
                 'if not %s:\n        raise ValueError("%s must not be empty")\n    return %s' % (n.text, n.text, n.text)),
        lambda: ("%s_or_default" % n.text, "%s, default" % n.text, "Return %s, or default if it is None." % n.text,
                 "return default if %s is None else %s" % (n.text, n.text)),
        lambda: ("compare_%s" % a, "first, second", "Return True if first has a larger %s than second." % a,
                 "return first.%s > second.%s" % (a, a)),
        lambda: ("same_%s" % n.text, "first, second", "Return True if both have the same %s." % n.text,
                 "return first.%s == second.%s" % (n.text, n.text)),
        lambda: ("increase_%s" % a, "%s, amount" % noun, "Increase the %s of the %s by amount." % (a, noun),
                 "%s.%s += amount" % (noun, a)),
        lambda: ("decrease_%s" % a, "%s, amount" % noun, "Decrease the %s of the %s by amount." % (a, noun),
                 "%s.%s -= amount" % (noun, a)),
        lambda: ("is_%s" % n.flag, noun, "Return True if the %s is %s." % (noun, n.flag), "return %s.%s" % (noun, n.flag)),
        lambda: ("make_%s" % noun, "%s, %s" % (n.text, a), "Create a %s." % noun,
                 'return {"%s": %s, "%s": %s}' % (n.text, n.text, a, a)),
        lambda: ("create_%s" % noun, "%s, %s" % (n.text, a), "Create a %s." % noun,
                 "return %s(%s, %s)" % (noun.title().replace("_", ""), n.text, a)),
        lambda: ("create_%s" % noun, "%s, %s" % (n.text, a), "Create a %s." % noun,
                 "return %s(%s=%s, %s=%s)" % (noun.title().replace("_", ""), n.text, n.text, a, a)),
        lambda: ("format_%s" % noun, noun, "Return the %s and %s of the %s as text." % (n.text, a, noun),
                 'return f"{%s.%s}: {%s.%s}"' % (noun, n.text, noun, a)),
        lambda: ("greet", n.text, "Return a greeting for %s." % n.text, 'return f"Hello, {%s}!"' % n.text),
        lambda: ("swap", "%s, %s" % (a, b), "Return %s and %s in the other order." % (a, b), "return %s, %s" % (b, a)),
        lambda: ("update_%s" % noun, "%s, %s" % (n.nouns, noun), "Store the %s by its %s." % (noun, n.text),
                 "%s[%s.%s] = %s" % (n.nouns, noun, n.text, noun)),
        lambda: ("lookup_%s" % noun, "%s, %s" % (n.nouns, n.text), "Return the %s stored under %s, or None." % (noun, n.text),
                 "return %s.get(%s)" % (n.nouns, n.text)),
        lambda: ("parse_%s" % noun, "line", "Parse a %s from a line." % noun,
                 '%s, %s = line.split(",")\n    return %s, %s' % (n.text, a, n.text, a)),
        lambda: ("copy_%s" % noun, "%s" % noun, "Return a copy of the %s." % noun, "return copy.copy(%s)" % noun),
        lambda: ("log_%s" % noun, "%s" % noun, "Log the %s." % noun, 'logger.info("%s: %%s", %s)' % (noun, noun)),
        lambda: ("clamp_%s" % a, "%s, low, high" % a, "Clamp %s between low and high." % a, "return max(low, min(%s, high))" % a),
        lambda: ("scale_%s" % a, "%s, factor" % a, "Multiply %s by factor." % a, "return %s * factor" % a),
        lambda: ("is_%s_valid" % a, "%s" % a, "Return True if %s is positive." % a, "return %s > 0" % a),
    ]
    name, parameters, doc, body = kinds[rng.randrange(len(kinds))]()
    doc = '    """%s"""\n' % doc if rng.random() < 0.85 else ""
    return "def %s(%s):\n%s    %s" % (name, parameters, doc, body)


def over_files(rng, names):
    n = names
    c = rng.choice
    path = c(["path", "path", "filename", "file_path", n.noun + "_path"])
    handle = c(["file", "f", "f", "handle"])
    kinds = [
        lambda: ("read_" + c(["text", "file", n.noun]), path, "Return the contents of the file.",
                 "with open(%s) as %s:\n        return %s.read()" % (path, handle, handle)),
        lambda: ("write_" + c(["text", "file", n.noun]), path + ", text", "Write text to the file.",
                 'with open(%s, "w") as %s:\n        %s.write(text)' % (path, handle, handle)),
        lambda: ("append_line", path + ", line", "Append a line to the file.",
                 'with open(%s, "a") as %s:\n        %s.write(line + "\\n")' % (path, handle, handle)),
        lambda: ("read_lines", path, "Return the lines of the file without newlines.",
                 "with open(%s) as %s:\n        return [line.strip() for line in %s]" % (path, handle, handle)),
        lambda: ("count_lines", path, "Return the number of lines in the file.",
                 "with open(%s) as %s:\n        return sum(1 for line in %s)" % (path, handle, handle)),
        lambda: (c(["load_json", "read_json", "load_%s" % n.nouns]), path, "Load JSON from the file.",
                 "with open(%s) as %s:\n        return json.load(%s)" % (path, handle, handle)),
        lambda: (c(["save_json", "write_json", "save_%s" % n.nouns]), "%s, %s" % (n.nouns, path), "Save %s to the file as JSON." % n.nouns,
                 'with open(%s, "w") as %s:\n        json.dump(%s, %s)' % (path, handle, n.nouns, handle)),
        lambda: ("file_exists", path, "Return True if the file exists.", "return os.path.exists(%s)" % path),
        lambda: ("file_size", path, "Return the size of the file in bytes.", "return os.path.getsize(%s)" % path),
        lambda: ("read_csv", path, "Return the rows of the CSV file.",
                 "with open(%s) as %s:\n        return list(csv.reader(%s))" % (path, handle, handle)),
    ]
    name, parameters, doc, body = kinds[rng.randrange(len(kinds))]()
    doc = '    """%s"""\n' % doc if rng.random() < 0.8 else ""
    return "def %s(%s):\n%s    %s" % (name, parameters, doc, body)


def fixed(rng, names):
    """The small classics, with names renamed at times."""
    c = rng.choice
    if rng.random() < 0.3:
        return c(LOOPS)
    if rng.random() < 0.2:
        name, parameter, doc, expression = c(UNITS)
        return 'def %s(%s):\n    """%s"""\n    return %s' % (name, parameter, doc, expression.format(x=parameter))
    name, parameters, doc, expression = c(GEOMETRY)
    text = "def %s(%s):\n" % (name, parameters)
    if rng.random() < 0.85:
        text += '    """%s"""\n' % doc
    return text + "    return " + expression


def function(rng, held_out=False):
    """One function. `held_out`: its nouns, and half of its fields, are from lists that training never sees."""
    names = Names(rng, held_out)
    pick = rng.random()
    if pick < 0.50 or (held_out and pick < 0.6):
        return over_collection(rng, names)
    if pick < 0.68 or (held_out and pick < 0.8):
        return over_values(rng, names)
    if pick < 0.84 or held_out:
        return method(rng, names)
    if pick < 0.90:
        return over_files(rng, names)
    return fixed(rng, names)
