//! Rows to text. Pure.

use anyhow::{Context, Result};
use comfy_table::{Table, presets};
use serde::Serialize;
use serde_json::{Value, json};

use crate::cli::{Format, Global};

/// Version of the JSON documents.
pub const API_VERSION: &str = "mesh-ctl/v1";
/// Spaces between columns, as kubectl does it.
const GAP: u16 = 3;

/// A column: its header, and whether only `-o wide` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Column {
    /// Always shown.
    Narrow(&'static str),
    /// Shown with `-o wide`.
    Wide(&'static str),
}

/// What a list consists of.
pub trait Row: Serialize {
    /// `kind` of the JSON document.
    const KIND: &'static str;
    /// In order.
    const COLUMNS: &'static [Column];
    /// One a column.
    fn cells(&self) -> Vec<String>;
}

/// An item and the node that said it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OnNode<T> {
    /// Node.
    pub node: String,
    /// Item.
    #[serde(flatten)]
    pub item: T,
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Format.
    pub format: Format,
    /// Whether a table has a header.
    pub headers: bool,
}

impl View {
    /// As the command line says.
    pub fn of(global: &Global) -> Self {
        Self { format: global.output, headers: !global.no_headers }
    }

    /// Whether a person reads it.
    pub fn is_table(self) -> bool {
        matches!(self.format, Format::Table | Format::Wide)
    }
}

/// A list in the wanted format, ending with a newline.
///
/// # Errors
/// It cannot be written as JSON or YAML.
pub fn list<R: Row>(rows: &[R], view: View) -> Result<String> {
    match view.format {
        Format::Table => Ok(table(rows, view.headers, Width::Narrow)),
        Format::Wide => Ok(table(rows, view.headers, Width::Wide)),
        Format::Json | Format::Yaml => {
            document(&json!({"apiVersion": API_VERSION, "kind": R::KIND, "items": rows}), view.format)
        }
    }
}

/// A JSON value as JSON or YAML.
///
/// # Errors
/// It cannot be written as YAML.
pub fn document(value: &Value, format: Format) -> Result<String> {
    match format {
        Format::Yaml => serde_saphyr::to_string(value).context("write YAML"),
        Format::Json | Format::Table | Format::Wide => {
            Ok(serde_json::to_string_pretty(value).context("write JSON")? + "\n")
        }
    }
}

#[derive(Clone, Copy)]
enum Width {
    Narrow,
    Wide,
}

fn table<R: Row>(rows: &[R], headers: bool, width: Width) -> String {
    if rows.is_empty() {
        return if headers { format!("no {} found\n", R::KIND) } else { String::new() };
    }
    let shown: Vec<(usize, &str)> = R::COLUMNS
        .iter()
        .enumerate()
        .filter_map(|(i, column)| match (column, &width) {
            (Column::Narrow(name), _) | (Column::Wide(name), Width::Wide) => Some((i, *name)),
            (Column::Wide(_), Width::Narrow) => None,
        })
        .collect();
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if headers {
        table.set_header(shown.iter().map(|(_, name)| *name));
    }
    for row in rows {
        let cells = row.cells();
        table.add_row(shown.iter().map(|(i, _)| match cells.get(*i).map(String::as_str) {
            None | Some("") => "-",
            Some(text) => text,
        }));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, GAP));
    }
    table.lines().map(|line| line.trim_end().to_string() + "\n").collect()
}

/// Seconds as kubectl writes ages: the two largest units.
pub fn age(secs: u64) -> String {
    match secs {
        0..120 => format!("{secs}s"),
        120..7200 => format!("{}m{}s", secs / 60, secs % 60),
        7200..172_800 => format!("{}h{}m", secs / 3600, secs % 3600 / 60),
        172_800.. => format!("{}d{}h", secs / 86400, secs % 86400 / 3600),
    }
}

/// The last part of a SPIFFE identity's path: `NAMESPACE/SERVICE-ACCOUNT`, or the text as it is.
pub fn short_identity(identity: &str) -> String {
    identity
        .parse::<mesh_core::identity::SpiffeId>()
        .map_or_else(|_| identity.to_string(), |id| format!("{}/{}", id.namespace, id.service_account))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Fruit {
        name: &'static str,
        colour: &'static str,
    }

    impl Row for Fruit {
        const KIND: &'static str = "Fruit";
        const COLUMNS: &'static [Column] = &[Column::Narrow("NAME"), Column::Wide("COLOUR")];
        fn cells(&self) -> Vec<String> {
            vec![self.name.into(), self.colour.into()]
        }
    }

    fn rows() -> Vec<Fruit> {
        vec![Fruit { name: "pear", colour: "green" }, Fruit { name: "a", colour: "" }]
    }

    fn view(format: Format) -> View {
        View { format, headers: true }
    }

    #[test]
    fn tables_look_like_kubectl() {
        assert_eq!(list(&rows(), view(Format::Table)).unwrap(), "NAME\npear\na\n");
        assert_eq!(list(&rows(), view(Format::Wide)).unwrap(), "NAME   COLOUR\npear   green\na      -\n");
        let bare = View { format: Format::Wide, headers: false };
        assert_eq!(list(&rows(), bare).unwrap(), "pear   green\na      -\n");
        assert_eq!(list::<Fruit>(&[], view(Format::Table)).unwrap(), "no Fruit found\n");
        assert_eq!(list::<Fruit>(&[], bare).unwrap(), "");
    }

    #[test]
    fn documents_hold_all_fields_in_every_format() {
        let json: Value = serde_json::from_str(&list(&rows(), view(Format::Json)).unwrap()).unwrap();
        assert_eq!(json["apiVersion"], "mesh-ctl/v1");
        assert_eq!(json["kind"], "Fruit");
        assert_eq!(json["items"][0]["colour"], "green");
        let yaml: Value = serde_saphyr::from_str(&list(&rows(), view(Format::Yaml)).unwrap()).unwrap();
        assert_eq!(yaml, json);
    }

    #[test]
    fn ages_have_two_units_at_most() {
        let texts: Vec<_> = [5, 125, 7265, 200_000].into_iter().map(age).collect();
        assert_eq!(texts, ["5s", "2m5s", "2h1m", "2d7h"]);
    }
}
