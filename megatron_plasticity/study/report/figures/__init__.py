"""The figures of the report, drawn with matplotlib as inline SVG."""
