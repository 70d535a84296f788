//! The page at `/docs`: renders the OpenAPI document as HTML without scripts.

use serde_json::{Map, Value};

/// The page for an OpenAPI document. All texts are escaped, although they come from this program.
pub fn html(api: &Value) -> String {
    let operations: String = entries(&api["paths"])
        .flat_map(|(path, methods)| entries(methods).map(move |(method, operation)| (method, path, operation)))
        .map(|(method, path, operation)| self::operation(method, path, operation))
        .collect();
    let schemas: String =
        entries(&api["components"]["schemas"]).map(|(name, schema)| self::schema(name, schema)).collect();
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}: the API</title>\n<link rel=\"icon\" href=\"playground.svg\">\n<link rel=\"stylesheet\" href=\"docs.css\">\n\
         <main>\n<h1>{title}</h1>\n<p>{about}</p>\n\
         <p>For programs: <a href=\"openapi.json\">openapi.json</a>, version {version}.</p>\n\
         {operations}<h2 id=\"types\">Types</h2>\n{schemas}</main>\n</html>\n",
        title = prose(&api["info"]["title"]),
        about = prose(&api["info"]["description"]),
        version = prose(&api["info"]["version"]),
    )
}

fn operation(method: &str, path: &str, operation: &Value) -> String {
    let body = &operation["requestBody"]["content"]["application/json"]["schema"];
    let body = match body {
        Value::Null => String::new(),
        body => format!("<p>Send {} as JSON.</p>\n", type_of(body)),
    };
    let responses = entries(&operation["responses"]).map(|(status, response)| {
        let content = entries(&response["content"]).map(|(kind, media)| match kind {
            "application/json" => type_of(&media["schema"]),
            kind => format!("<code>{}</code>", escaped(kind)),
        });
        [escaped(status), prose(&response["description"]), content.collect::<Vec<_>>().join(" or ")]
    });
    format!(
        "<section>\n<h2><span>{}</span> <code>{}</code></h2>\n<p><strong>{}</strong></p>\n<p>{}</p>\n{body}\
         <details>\n<summary>Responses</summary>\n{}</details>\n</section>\n",
        escaped(&method.to_uppercase()),
        escaped(path),
        prose(&operation["summary"]),
        prose(&operation["description"]),
        table(["status", "when", "body"], responses),
    )
}

fn schema(name: &str, schema: &Value) -> String {
    let parts = schema["allOf"].as_array().map_or_else(|| vec![schema], |parts| parts.iter().collect());
    let bases = parts.iter().filter(|part| part.get("properties").is_none() && parts.len() > 1);
    let bases: String = bases.map(|part| format!("<p>All of {}, and:</p>\n", type_of(part))).collect();
    let fields = parts.iter().flat_map(|part| {
        let required = part["required"].as_array().map(Vec::as_slice).unwrap_or_default();
        entries(&part["properties"]).map(move |(field, schema)| {
            let optional = if required.iter().any(|name| name == field) { "" } else { ", optional" };
            [format!("<code>{}</code>", escaped(field)), type_of(schema) + optional, prose(&schema["description"])]
        })
    });
    let fields: Vec<_> = fields.collect();
    let body = match fields.is_empty() {
        true => format!("<p>{}</p>\n", type_of(schema)),
        false => table(["field", "type", "meaning"], fields.into_iter()),
    };
    let about = prose(&schema["description"]);
    format!("<section>\n<h3 id=\"{name}\">{name}</h3>\n<p>{about}</p>\n{bases}{body}</section>\n", name = escaped(name))
}

fn table(heads: [&str; 3], rows: impl Iterator<Item = [String; 3]>) -> String {
    let cells = |cells: [String; 3]| format!("<tr><td>{}</td></tr>\n", cells.join("</td><td>"));
    let rows: String = rows.map(cells).collect();
    format!("<div><table>\n<tr><th>{}</th></tr>\n{rows}</table></div>\n", heads.join("</th><th>"))
}

/// A type in words; a named type is a link.
fn type_of(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
        return format!("<a href=\"#{0}\">{0}</a>", escaped(name));
    }
    if let Some(values) = schema["enum"].as_array() {
        let values = values.iter().filter_map(Value::as_str).map(|value| format!("<code>{}</code>", escaped(value)));
        return values.collect::<Vec<_>>().join(", ");
    }
    if let Some(choices) = schema["oneOf"].as_array().or_else(|| schema["allOf"].as_array()) {
        return choices.iter().map(type_of).collect::<Vec<_>>().join(" or ");
    }
    let name = |name: &str| match name {
        "array" => format!("list of {}", type_of(&schema["items"])),
        name => escaped(name),
    };
    match &schema["type"] {
        Value::String(one) => name(one),
        Value::Array(names) => names.iter().filter_map(Value::as_str).map(name).collect::<Vec<_>>().join(" or "),
        _ => "anything".to_owned(),
    }
}

/// A text with its backticks rendered as `<code>`.
fn prose(text: &Value) -> String {
    let text = escaped(text.as_str().unwrap_or_default());
    let parts = text.split('`').enumerate().map(|(at, part)| match at % 2 {
        0 => part.to_owned(),
        _ => format!("<code>{part}</code>"),
    });
    parts.collect()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The fields of an object; none if the value is not an object.
fn entries(value: &Value) -> impl Iterator<Item = (&str, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter).map(|(name, value)| (name.as_str(), value))
}
