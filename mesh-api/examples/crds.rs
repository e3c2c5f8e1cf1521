//! Writes the CustomResourceDefinitions into the directory that is given, and removes files of kinds that are gone.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use mesh_api::crd::{Definition, definitions};

fn main() -> ExitCode {
    let Some(directory) = std::env::args_os().nth(1) else {
        eprintln!("usage: crds DIRECTORY");
        return ExitCode::FAILURE;
    };
    match write(Path::new(&directory)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write(directory: &Path) -> Result<(), Box<dyn std::error::Error>> {
    fs::create_dir_all(directory)?;
    let definitions = definitions();
    let names: Vec<String> = definitions.iter().map(Definition::file_name).collect();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.ends_with(".yaml") && !names.iter().any(|known| known == name) {
            fs::remove_file(&path)?;
        }
    }
    for definition in definitions {
        fs::write(directory.join(definition.file_name()), definition.to_yaml()?)?;
    }
    Ok(())
}
