def html_document(rows, environment, training=()): return ""
