"""Media: files and bytes become frames and pixels. numpy only: knows no torch and no Ray."""
