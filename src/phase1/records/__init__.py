"""Result files: their schema, older versions, and the finished cases of an unfinished run."""
