"""Results as Markdown."""

def markdown_table(head, rows):
    "The lines of a table"
    lines = [head, ["---"]*len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]

def circumstances(record, *packages):
    "Rounds, machine, versions and date of a result, and what else is known of it"
    known = record["versions"]
    parts = [place(record["machine"])]
    if "python" in known:
        parts.append(f"Python {known['python']}")
    parts += [f"{p} {known[p]}" for p in packages if p in known]
    if record["rounds"] > 1:
        parts[0] = f"{record['statistic']} of {record['rounds']} rounds on {parts[0]}"
    text = ", ".join(parts)
    return " ".join([f"{text[0].upper()}{text[1:]}; {when(record)}.", *notes(record)])

def place(machine):
    "The GPU, or the processor"
    if machine["gpu"]:
        return machine["gpu"]
    processor = f" ({machine['processor']})" if machine["processor"] else ""
    return (f"{machine['cores']} cores{processor}"
            + (f", {machine['system']}" if machine["system"] else ""))

def when(record):
    "When a result was measured or, if that is not known, published"
    if record["date"]:
        return f"measured on {record['date'][:10]}"
    return (f"published on {record['published']}"
            + ("" if record["raw"] else "; the rounds are not kept"))

def notes(record):
    "What a result says of itself"
    return [record["note"]] if record.get("note") else []

def number(value, form, unit=""):
    "A formatted number, or nothing"
    return "" if value is None else f"{value:{form}}{unit}"
