// Bundles the libraries of the page into llava_interleave/server/web/build, with their licences.

import { build } from "esbuild";
import { readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";

const outdir = "../llava_interleave/server/web/build";
rmSync(outdir, { recursive: true, force: true });
const { metafile } = await build({
  entryPoints: ["markdown.js"],
  outdir,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  legalComments: "none", // LICENSES.txt has them
  loader: { ".woff2": "file" },
  external: ["*.woff", "*.ttf"],
  assetNames: "[name]",
  metafile: true,
});
const packages = Object.keys(metafile.inputs).map((path) => path.match(/^node_modules\/[^/]+/)?.[0]);
const texts = [...new Set(packages.filter(Boolean))].sort().map((folder) => {
  const { name, version } = JSON.parse(readFileSync(`${folder}/package.json`, "utf8"));
  const file = readdirSync(folder).find((entry) => /^licen[cs]e/i.test(entry));
  if (!file) throw new Error(`${name} has no licence file`);
  return `${name} ${version}\n\n${readFileSync(`${folder}/${file}`, "utf8")}`;
});
writeFileSync(`${outdir}/LICENSES.txt`, texts.join("\n\n"));
